"""pack reproduce."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command("reproduce", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all cores]"
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(folder: Path, threads: int | None, quiet: bool) -> None:
    """Make a release again from its recipe and inputs, and compare it bit by bit.

    Models on the Hub are fetched at the commits that the recipe names; paths are looked for from
    the current folder.
    """
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import Options, default_threads
    from mergekit_lite.release.reproduce import reproduce

    with make_progress(quiet) as progress:
        found = reproduce(folder, Options(threads or default_threads()), progress)
    if found.differing:
        listed = "".join(f"\n  {name}" for name in found.differing[:20])
        raise PackError(
            f"{folder}: {len(found.differing)} file(s) come out differently:{listed}",
            "Another version of pack or of its libraries may have made it; see pack.lock.",
        )
    if not quiet:
        click.echo(f"the same, bit by bit: sha256:{found.found}")
