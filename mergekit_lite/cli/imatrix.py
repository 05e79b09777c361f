"""pack imatrix."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lite.cli.options import OUTPUT, TEXT
from mergekit_lite.cli.table import echo_table
from mergekit_lite.text import plain

__all__ = ["CONTEXT", "WINDOWS", "command"]

CONTEXT, WINDOWS = 256, 128
"""Tokens of a window, and windows at most."""


@click.command("imatrix", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="MODEL | FILE")
@click.option(
    "--text", "path", type=TEXT, metavar="FILE",
    help="Text, or JSON lines with text or messages.  [default: a small one that comes along]",
)  # fmt: skip
@click.option(
    "-o", "--output", type=OUTPUT, metavar="FILE",
    help="Where it goes.  [default: NAME.imatrix.gguf]",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(2, 1 << 20), default=CONTEXT, show_default=True,
    help="Tokens of a window.",
)  # fmt: skip
@click.option(
    "--windows", type=click.IntRange(2, 1 << 20), default=WINDOWS, show_default=True,
    help="Windows at most.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    model: str,
    path: Path | None,
    output: Path | None,
    context: int,
    windows: int,
    device: str,
    quiet: bool,
) -> None:
    """Measure how much each column of MODEL's weights matters on a text, for quantizing to GGUF.

    The model (a folder, a Hub id, base+adapter, or a recipe that has not run) is run one decoder
    layer at a time. The file is llama.cpp's own: pack quantize --imatrix and llama-quantize read
    it. Of an importance matrix, FILE, it is shown what it holds.
    """
    from exporters.gguf.imatrix import read_imatrix
    from exporters.gguf.importance import importance_of, write_imatrix
    from mergekit_lite.adapters.factor import check_device
    from mergekit_lite.cli.progress import make_progress

    if Path(model).is_file() and Path(model).suffix in (".gguf", ".dat") and path is None:
        found = read_imatrix(Path(model))
        rows = [
            [plain(name), str(values.shape[-1]), str(values.shape[0] if values.ndim > 1 else 1),
             f"{values.mean():.3g}", f"{values.max():.3g}"]
            for name, values in sorted(found.items())
        ]  # fmt: skip
        echo_table(["tensor", "columns", "experts", "mean square", "largest"], rows)
        return
    check_device(device)
    with make_progress(quiet) as progress:
        measured = importance_of(model, path, context, windows, progress, device)
    target = output or Path(f"{Path(model.rstrip('/')).stem}.imatrix.gguf")
    write_imatrix(measured, target)
    if not quiet:
        click.echo(plain(
            f"{len(measured.sums)} tensors, on {len(measured.windows.ids)} windows of {context} "
            f"tokens of {measured.windows.text.name} → {target}"
        ))  # fmt: skip
