"""pack extract."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergekit_lite.cli.options import OUTPUT
from mergekit_lite.cli.ranks import rank_table
from mergekit_lite.text import human_bytes

__all__ = ["command"]


@click.command("extract", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("finetuned")
@click.option("--base", required=True, metavar="BASE", help="The model that it was trained from.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Largest rank of a module.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Share of each module's change to keep, for example 0.95; with --rank, at most that rank.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=OUTPUT, metavar="DIR",
    help="Where the adapter goes.  [default: dist/NAME/adapter]",
)  # fmt: skip
@click.option(
    "--save-below", type=click.FloatRange(0, 1), default=0.9, show_default=True, metavar="SHARE",
    help="Save embeddings and output head whole where factors would keep less than this.",
)  # fmt: skip
@click.option("--dtype", default="float32", show_default=True, help="Type of the factors.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with torch.")
@click.option("--force", is_flag=True, help="Replace an existing result.")
@click.option("--rehash", is_flag=True, help="Hash inputs again that were hashed before.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    finetuned: str,
    base: str,
    rank: int | None,
    energy: float | None,
    output: Path | None,
    save_below: float,
    dtype: str,
    device: str,
    force: bool,
    rehash: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a LoRA adapter of what FINETUNED changed in BASE.

    Every linear layer and embedding that changed gets factors of its own rank; norms that changed
    are saved whole. Says which share of the change the adapter carries.
    """
    from mergekit_lite.adapters.factor import Target
    from mergekit_lite.adapters.locate import open_model
    from mergekit_lite.checkpoint.known import KNOWN
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.dtypes import by_config_name
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.extract import ExtractOptions, run_extract
    from mergekit_lite.merge.writer import refuse_existing

    KNOWN.enabled = not rehash
    if rank is None and energy is None:
        raise click.UsageError("say how much to keep: --rank 32, or --energy 0.95, or both")
    kind = by_config_name(dtype)
    if kind is None or not kind.is_float:
        raise click.UsageError(f"--dtype {dtype}: unknown; use float32, bfloat16 or float16")
    name = Path(finetuned).resolve().name if Path(finetuned).exists() else Path(finetuned).name
    folder = output or Path("dist") / name.partition("@")[0] / "adapter"
    refuse_existing(folder, force)
    options = ExtractOptions(Target(rank, energy), save_below, kind, device, force)
    with make_progress(quiet or as_json) as progress:
        tuned = open_model(finetuned, Path())
        try:
            source = open_model(base, Path())
        except PackError:
            tuned.checkpoint.close()
            raise
        try:
            result = run_extract(tuned, source, folder, options, progress)
        finally:
            tuned.checkpoint.close()
            source.checkpoint.close()
    size = sum(o.size for o in result.outputs)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(folder),
                    "seconds": round(result.seconds, 3),
                    "bytes": size,
                    "energy": result.energy,
                    "whole": list(result.whole),
                    "modules": {
                        e.path: {
                            "rank": e.factored.rank,
                            "energy": e.factored.kept,
                            "relative_change": e.change,
                        }
                        for e in result.modules
                    },
                }
            )
        )
    elif not quiet:
        for line in rank_table([(e.path, e.factored) for e in result.modules]):
            click.echo(line)
        if result.whole:
            click.echo(
                f"saved whole: {', '.join(result.whole[:4])}"
                + (f" … (+{len(result.whole) - 4})" if len(result.whole) > 4 else "")
            )
        click.echo(
            f"extract: {result.energy:.2%} of the change, {human_bytes(size)} "
            f"in {result.seconds:.1f} s → {folder}"
        )
