"""pack reproduce."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command("reproduce", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("release")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all cores]"
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(release: str, threads: int | None, quiet: bool) -> None:
    """Make a release again from its recipe and inputs, and compare it bit by bit.

    RELEASE is a folder, a .tar or .tar.zst, an OCI image layout, org/name[@revision] on the Hub, or
    oci://REGISTRY/NAME:TAG. Models on the Hub are fetched at the commits that the recipe names;
    paths are looked for from the current folder.
    """
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import Options, default_threads
    from mergekit_lite.release.place import placed
    from mergekit_lite.release.reproduce import reproduce

    with placed(release) as place, make_progress(quiet) as progress:
        options = Options(threads or default_threads())
        found = reproduce(place.folder, options, progress, place.links_into, place.ignored)
    if found.differing:
        listed = "".join(f"\n  {name}" for name in found.differing[:20])
        raise PackError(
            f"{release}: {len(found.differing)} file(s) come out differently:{listed}",
            "Another version of pack or of its libraries may have made it; see pack.lock.",
        )
    if not quiet:
        click.echo(f"the same, bit by bit: sha256:{found.found}")
