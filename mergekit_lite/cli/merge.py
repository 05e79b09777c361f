"""pack merge."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergekit_lite.cli.options import SIZE, human_bytes, split_method

__all__ = ["command"]


@click.command("merge", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("words", nargs=-1, required=True, metavar="[METHOD] RECIPE")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
    help="Where the result goes.  [default: dist/NAME/merged]",
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
@click.option("--rehash", is_flag=True, help="Hash inputs again that were hashed before.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    words: tuple[str, ...],
    output: Path | None,
    force: bool,
    memory: int,
    threads: int | None,
    shard_size: int,
    rehash: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge models as RECIPE (a YAML file) says.

    METHOD is one of: linear, slerp, ties, dare (dare_linear or dare_ties), task_arithmetic,
    passthrough; see `pack methods`. It fills in the recipe's merge_method, or must agree with it.

    A run that was stopped is continued by the same command.
    """
    from mergekit_lite.checkpoint.known import KNOWN
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.merge.run import Options, check_memory, default_threads, prepare, run_merge
    from mergekit_lite.merge.writer import refuse_existing
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe

    KNOWN.enabled = not rehash
    method, path = split_method(words)
    check_memory(memory)
    recipe = read_recipe(path, METHODS, ALIASES, method)
    folder = output or Path("dist") / str(recipe.name) / "merged"
    refuse_existing(folder, force)
    options = Options(threads or default_threads(), memory, max(1, shard_size), force)
    with make_progress(quiet or as_json) as progress:
        prepared = prepare(recipe, path.parent, options.shard_bytes)
        result = run_merge(prepared, folder, options, progress)
    size = sum(o.size for o in result.outputs)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(result.folder),
                    "method": prepared.plan.method.name,
                    "seconds": round(result.seconds, 3),
                    "bytes": size,
                    "notes": prepared.notes,
                    "nonfinite": dict(result.nonfinite),
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
            f"in {result.seconds:.1f} s → {result.folder}"
        )
