"""pack merge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.options import (
    CACHE,
    OUTPUT_ANYWHERE,
    SIZE,
    complete_merge,
    engine_options,
    make_engine,
    split_method,
)
from mergekit_lite.cli.ranks import rank_table
from mergekit_lite.text import human_bytes

if TYPE_CHECKING:
    from mergekit_lite.merge.address import Address
    from mergekit_lite.merge.destination import Upload
    from mergekit_lite.recipe import Recipe

__all__ = ["command"]


@click.command("merge", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "words", nargs=-1, required=True, metavar="[METHOD] RECIPE", shell_complete=complete_merge
)
@click.option(
    "-o", "--output", type=OUTPUT_ANYWHERE, metavar="WHERE",
    help="Where the result goes: a folder, s3://BUCKET/PREFIX or hf://ORG/NAME.  "
    "[default: dist/NAME/merged]",
)  # fmt: skip
@click.option(
    "--dtype", metavar="TYPE",
    help="Type of a result without a recipe.  [default: the base's]",
)  # fmt: skip
@click.option(
    "--rank", type=click.IntRange(1), metavar="N",
    help="With `output: adapter`: the largest rank of the result.",
)  # fmt: skip
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="With `output: adapter`: the share of each change to keep, for example 0.95.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing result.")
@click.option("--memory", type=SIZE, default="512MB", show_default=True, help="Memory for weights.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all cores]"
)
@click.option(
    "--shard-size", type=SIZE, default="2GB", show_default=True,
    help="Most bytes of an output file; a stopped run continues at the next file.",
)  # fmt: skip
@CACHE
@engine_options
@click.option("--rehash", is_flag=True, help="Hash inputs again that were hashed before.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    words: tuple[str, ...],
    output: Path | Address | None,
    dtype: str | None,
    rank: int | None,
    energy: float | None,
    force: bool,
    memory: int,
    threads: int | None,
    shard_size: int,
    engine_name: str,
    address: str | None,
    rehash: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge models as RECIPE (a YAML file) says, or adapters into a base.

    \b
    pack merge [METHOD] RECIPE
    pack merge adapter BASE+ADAPTER     (BASE+0.7*ADAPTER+-0.3*OTHER for weights)
    pack merge ties BASE+ADAPTER BASE+OTHER BASE+THIRD

    METHOD is one of: linear, slerp, ties, dare (dare_linear or dare_ties), task_arithmetic,
    passthrough; see `pack methods`. It fills in the recipe's merge_method, or must agree with it.

    A run that was stopped is continued by the same command.
    """  # noqa: D301 (click reads the character)
    from mergekit_lite.checkpoint.known import KNOWN
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.merge.run import Options, check_memory, default_threads, prepare, run_merge
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe

    KNOWN.enabled = not rehash
    check_memory(memory)
    if words[0] == "adapter" or (len(words) > 1 and all("+" in word for word in words[1:])):
        recipe, home = _adapter_recipe(words[0], words[1:], dtype), Path()
    else:
        if dtype is not None:
            raise click.UsageError("--dtype goes with BASE+ADAPTER; a recipe has 'dtype'")
        method, path = split_method(words)
        recipe, home = read_recipe(path, METHODS, ALIASES, method), path.parent
    if recipe.output == "adapters":
        raise click.UsageError(f"the recipe asks for a bundle; run: pack adapters {words[-1]}")
    if recipe.output == "adapter":
        if engine_name != "local":
            raise click.UsageError(
                f"--engine {engine_name} spreads models over their output files; an adapter is "
                "one file, and made here"
            )
        recipe = _with_target(recipe, rank, energy)
        if output is not None and not isinstance(output, Path):
            raise click.UsageError(f"an adapter is written to a folder, not to {output}: -o DIR")
        _merge_adapters(recipe, home, output, force=force, as_json=as_json, quiet=quiet)
        return
    if rank is not None or energy is not None:
        raise click.UsageError("--rank and --energy go with a recipe of 'output: adapter'")
    place = _place(output or Path("dist") / str(recipe.name) / "merged", force)
    shard_bytes = max(1, shard_size)
    with (
        make_engine(engine_name, address, threads) as engine,
        make_progress(quiet or as_json) as progress,
    ):
        options = Options(threads or default_threads(), memory, shard_bytes, force, engine)
        prepared = prepare(recipe, home, shard_bytes)
        result = run_merge(prepared, place, options, progress)
    size = sum(o.size for o in result.outputs)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": result.location,
                    "method": prepared.plan.method.name,
                    "seconds": round(result.seconds, 3),
                    "bytes": size,
                    "notes": prepared.notes,
                    "nonfinite": dict(result.nonfinite),
                    "recomputed": result.recomputed,
                    "outputs": [
                        {"path": o.path, "bytes": o.size, "sha256": o.sha256}
                        for o in result.outputs
                    ],
                }
            )
        )
    if result.nonfinite and not quiet:
        names = list(result.nonfinite)
        click.secho(
            f"warning: {len(names)} tensor(s) hold NaN or infinity, first '{names[0]}' "
            f"({result.nonfinite[names[0]]} elements); a source is broken, or the type too small",
            fg="yellow", err=True,
        )  # fmt: skip
    if not quiet and not as_json:
        count = len(prepared.plan.tensors)
        click.echo(
            f"{prepared.plan.method.name}: {count} tensors, {human_bytes(size)} "
            f"in {result.seconds:.1f} s → {result.location}"
        )


def _place(output: Path | Address, force: bool) -> Path | Upload:
    """Where the result goes; a folder that may not be replaced is found before any model is."""
    from mergekit_lite.merge.destination import open_upload
    from mergekit_lite.merge.writer import refuse_existing

    if not isinstance(output, Path):
        return open_upload(output)
    refuse_existing(output, force)
    return output


def _with_target(recipe: Recipe, rank: int | None, energy: float | None) -> Recipe:
    """The recipe with what the command says of the result's rank; parameters stay attached."""
    from mergekit_lite.recipe import changed

    asked = {"rank": rank, "energy": energy}
    return changed(recipe, {key: value for key, value in asked.items() if value is not None})


def _merge_adapters(
    recipe: Recipe, home: Path, output: Path | None, *, force: bool, as_json: bool, quiet: bool
) -> None:
    """Merge adapters into an adapter, and say what was kept of them."""
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.merge.adapters import run_adapter_merge
    from mergekit_lite.merge.writer import refuse_existing

    folder = output or Path("dist") / str(recipe.name) / "adapter"
    refuse_existing(folder, force)
    with make_progress(quiet or as_json) as progress:
        result = run_adapter_merge(recipe, home, folder, force=force, progress=progress)
        for note in result.notes:
            progress.note(note)
    size = sum(o.size for o in result.outputs)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(folder),
                    "method": recipe.merge_method,
                    "seconds": round(result.seconds, 3),
                    "bytes": size,
                    "notes": list(result.notes),
                    "modules": {
                        m.path: {
                            "rank": m.factored.rank,
                            "energy": m.factored.kept,
                            "relative_error": m.factored.error,
                            "exact": m.exact,
                        }
                        for m in result.modules
                    },
                }
            )
        )
    elif not quiet:
        for line in rank_table([(m.path, m.factored) for m in result.modules]):
            click.echo(line)
        click.echo(
            f"{recipe.merge_method}: {len(result.modules)} modules, {human_bytes(size)} "
            f"in {result.seconds:.1f} s → {folder}"
        )


def _adapter_recipe(method: str, words: tuple[str, ...], dtype: str | None) -> Recipe:
    """The recipe of bases with adapters that stand on the command line.

    Args:
        method: ``adapter`` for one that is merged into its base, else a merge method.
        words: BASE+ADAPTER, one or more.
        dtype: Type of the result; None for the base's.
    """
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import parse_recipe
    from mergekit_lite.recipe.reference import parse_reference

    if method == "adapter" and len(words) != 1:
        raise click.UsageError("expected one model, for example: pack merge adapter base+adapter")
    references = [parse_reference(word) for word in words]
    for word, reference in zip(words, references, strict=True):
        if not reference.adapters:
            raise click.UsageError(
                f"'{word}' names no adapter; write BASE+ADAPTER, for example: base+my-lora"
            )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(references[-1].adapters[-1].name).name)
    document: dict[str, object] = {"models": [{"model": word} for word in words]}
    bases = {reference.base for reference in references}
    known = METHODS.get(ALIASES.get(method, (method,))[0])
    if known is not None and known.base and len(bases) == 1:
        document["base_model"] = bases.pop()
    if dtype:
        document["dtype"] = dtype
    chosen = "passthrough" if method == "adapter" else method
    text = json.dumps(document)
    return parse_recipe(
        text, f"pack merge {method}", name.strip("-._") or "merged", METHODS, ALIASES, chosen
    )
