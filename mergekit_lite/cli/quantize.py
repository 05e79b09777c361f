"""pack quantize."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from mergekit_lite.cli.options import SIZE, human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from exporters.gguf.mixtures import Overrides
    from exporters.gguf.run import Made, Request
    from mergekit_lite.dtypes import Array
    from mergekit_lite.merge.model import WholeModel

__all__ = ["command"]

_FORMATS = ("gguf",)
_COMMON = ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "q3_k_m", "iq4_xs", "q4_0", "bf16", "f16")


class _Target(click.Tuple):
    """FORMAT and SCHEME."""

    def __init__(self) -> None:
        super().__init__([str, str])

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete formats and the usual schemes."""
        return [CompletionItem(w) for w in (*_FORMATS, *_COMMON) if w.startswith(incomplete)]


@click.command("quantize", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option(
    "--to", "targets", type=_Target(), multiple=True, metavar="FORMAT SCHEME",
    help="What to make, for example: --to gguf q4_k_m. May be given several times; the weights "
    "are read once.",
)  # fmt: skip
@click.option("--list", "list_schemes", is_flag=True, help="List formats and schemes.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
    help="Where the result goes.  [default: dist/NAME/FORMAT-SCHEME]",
)  # fmt: skip
@click.option("--name", help="Name of the files.  [default: the model's]")
@click.option(
    "--imatrix", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Importance of columns, from pack imatrix or llama-imatrix.",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Text, or JSON lines; the importance of columns is measured on it.",
)  # fmt: skip
@click.option(
    "--tensor-type", "patterns", multiple=True, metavar="PATTERN=TYPE",
    help="Type of the tensors whose GGUF names hold a pattern (a regular expression), for "
    "example attn_v=q6_k; the first that fits holds.",
)  # fmt: skip
@click.option("--output-type", metavar="TYPE", help="Type of the output matrix.")
@click.option("--embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--pure", is_flag=True, help="Give all matrices the scheme's main type.")
@click.option("--split-max-size", type=SIZE, help="Most bytes of weights in a file.")
@click.option(
    "--verify/--no-verify", default=None,
    help="Compare what was written with the model.  [default: for small models]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing result.")
@click.option("--memory", type=SIZE, default="448MB", show_default=True, help="Memory for weights.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all cores]"
)
@click.option("--rehash", is_flag=True, help="Hash inputs again that were hashed before.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    model: str | None,
    targets: tuple[tuple[str, str], ...],
    list_schemes: bool,
    output: Path | None,
    name: str | None,
    imatrix: Path | None,
    calibration: Path | None,
    patterns: tuple[str, ...],
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    split_max_size: int | None,
    verify: bool | None,
    force: bool,
    memory: int,
    threads: int | None,
    rehash: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantize MODEL: a folder, a Hub id, BASE+ADAPTER, a .gguf file, or a recipe that has not run.

    \b
    pack quantize --to gguf q4_k_m                 (the model last made below dist)
    pack quantize --to gguf q4_k_m --to gguf q8_0 my-model
    pack quantize --to gguf q4_k_m recipe.yaml     (merged while it is quantized)

    Nothing is written between the model and the result, and nothing has to be compiled.
    """  # noqa: D301 (click reads the character)
    if list_schemes:
        _list()
        return
    if not targets:
        raise click.UsageError("say what to make, for example: --to gguf q4_k_m")
    from exporters.gguf.run import Options, prepare_gguf, run_gguf
    from mergekit_lite.checkpoint.known import KNOWN
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.merge.model import open_whole
    from mergekit_lite.merge.run import check_memory, default_threads

    KNOWN.enabled = not rehash
    check_memory(memory)
    overrides = _overrides(patterns, output_type, embedding_type, pure)
    _check_targets(targets)
    if imatrix is not None and calibration is not None:
        raise click.UsageError("give --imatrix or --calibration, not both")
    importance = _importance(model, imatrix, calibration, quiet or as_json)
    whole = open_whole(model)
    try:
        requests = _requests(whole, targets, overrides, output, name, importance, split_max_size)
        options = Options(threads or default_threads(), memory, force, verify)
        with make_progress(quiet or as_json) as progress:
            made = run_gguf(prepare_gguf(whole, requests), options, progress)
    finally:
        whole.close()
    if as_json:
        click.echo(json.dumps([_describe(result) for result in made]))
    elif not quiet:
        for result in made:
            _show(result)


def _check_targets(targets: tuple[tuple[str, str], ...]) -> None:
    from mergekit_lite.errors import nearest

    for target, _ in targets:
        if target not in _FORMATS:
            raise click.UsageError(
                f"no such format '{target}'{nearest(target, _FORMATS)}; known: "
                f"{', '.join(_FORMATS)}"
            )


def _importance(
    model: str | None, imatrix: Path | None, calibration: Path | None, quiet: bool
) -> Mapping[str, Array]:
    """Importance of columns: from a file, or measured; empty where none is asked for."""
    from exporters.gguf.imatrix import read_imatrix
    from mergekit_lite.cli.imatrix import CONTEXT, WINDOWS
    from mergekit_lite.cli.progress import make_progress

    if imatrix is not None:
        return read_imatrix(imatrix)
    if calibration is None:
        return {}
    from exporters.gguf.importance import importance_of

    with make_progress(quiet) as progress:
        return importance_of(model, calibration, CONTEXT, WINDOWS, progress).means()


def _requests(
    whole: WholeModel,
    targets: tuple[tuple[str, str], ...],
    overrides: Overrides,
    output: Path | None,
    name: str | None,
    importance: Mapping[str, Array],
    split_bytes: int | None,
) -> list[Request]:
    from exporters.gguf.export import Scheme
    from exporters.gguf.mixtures import find_mixture
    from exporters.gguf.run import Request

    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise click.UsageError(f"'{name}' is no name of a file: letters, digits, '.', '_' and '-'")
    if output is not None and output.suffix == ".gguf":
        raise click.UsageError(f"-o names a folder; the file gets its name by --name "
                               f"{output.stem}")  # fmt: skip
    stem = name or whole.name
    requests = []
    for target, word in dict.fromkeys(targets):
        mixture = find_mixture(word)
        last = f"{target}-{mixture.name}"
        folder = Path("dist") / stem / last
        if output is not None:
            folder = output / last if len(targets) > 1 else output
        scheme = Scheme(mixture, overrides, importance, split_bytes)
        requests.append(Request(scheme, folder, f"{stem}-{mixture.name.upper()}"))
    return requests


def _overrides(
    patterns: tuple[str, ...], output_type: str | None, embedding_type: str | None, pure: bool
) -> Overrides:
    from exporters.gguf.mixtures import Overrides, find_type

    found = []
    for entry in patterns:
        pattern, equals, kind = entry.rpartition("=")
        if not equals or not pattern:
            raise click.UsageError(
                f"--tensor-type {entry}: write PATTERN=TYPE, for example attn_v=q6_k"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise click.UsageError(
                f"--tensor-type {entry}: no regular expression ({error})"
            ) from None
        found.append((pattern, find_type(kind)))
    return Overrides(
        found,
        None if output_type is None else find_type(output_type),
        None if embedding_type is None else find_type(embedding_type),
        pure,
    )


def _list() -> None:
    from exporters.gguf.mixtures import MIXTURES

    click.echo("--to gguf …")
    for mixture in MIXTURES.values():
        click.echo(f"  {mixture.name:<10} {mixture.summary}")


def _describe(made: Made) -> dict[str, object]:
    return {
        "folder": str(made.folder),
        "seconds": round(made.seconds, 3),
        "bits_per_weight": round(made.bits, 3),
        "types": dict(made.types),
        "verification": None if made.verification is None else made.verification.describe(),
        "outputs": [{"path": o.path, "bytes": o.size, "sha256": o.sha256} for o in made.outputs],
    }


def _show(made: Made) -> None:
    size = sum(output.size for output in made.outputs)
    types = ", ".join(f"{count} {name}" for name, count in made.types.items())
    click.echo(
        f"{human_bytes(size)}, {made.bits:.2f} bits per weight ({types}) in {made.seconds:.1f} s"
    )
    if made.verification is not None:
        click.echo(made.verification.line())
        if made.verification.differing:
            click.secho(
                f"warning: tokenized otherwise, first: {made.verification.differing[0]!r:.70}",
                fg="yellow", err=True,
            )  # fmt: skip
    files = [o.path for o in made.outputs if o.path.endswith(".gguf")]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    click.echo(f"→ {made.folder / files[0]}{more}")
