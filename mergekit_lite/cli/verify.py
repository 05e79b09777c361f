"""pack verify."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from mergekit_lite.cli.options import human_bytes

__all__ = ["command"]


@click.command("verify", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--public-key", "key", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="KEY", help="Check the signature, too, with this public key (PEM).",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Files hashed side by side.  [default: cores]"
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    folder: Path, key: Path | None, threads: int | None, as_json: bool, quiet: bool
) -> None:
    """Check a release, its folder or its .tar: files against the manifest, papers against files.

    All that does not hold is named: changed, missing and extra files, papers that speak of others.
    """
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import default_threads
    from mergekit_lite.release.archive import unpack_archive
    from mergekit_lite.release.manifest import MANIFEST, SIGNATURE, read_manifest
    from mergekit_lite.release.sign import check_signature
    from mergekit_lite.release.verify import verify_release

    with ExitStack() as stack:
        if folder.is_file():
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="pack-"))
            place = unpack_archive(folder, Path(scratch))
        else:
            place = folder
        total = sum(entry.size for entry in read_manifest(place / MANIFEST)[1].values())
        progress = stack.enter_context(make_progress(quiet or as_json))
        progress.begin("Verify", total)
        found = verify_release(place, threads or default_threads(), progress.advance)
        wrong = check_signature(place, key) if key is not None else None
        signed = (place / SIGNATURE).is_file()
    if wrong is not None:
        found = replace(found, problems=(*found.problems, wrong))
    if as_json:
        click.echo(
            json.dumps(
                {
                    "name": found.name,
                    "version": found.version,
                    "digest": found.digest,
                    "files": found.files,
                    "problems": list(found.problems),
                }
            )
        )
    if found.problems:
        listed = "".join(f"\n  {problem}" for problem in found.problems)
        raise PackError(
            f"{folder}: {len(found.problems)} thing(s) do not hold:{listed}",
            "Do not use this release; download it again from whoever made it.",
        )
    if not quiet and not as_json:
        click.echo(
            f"{found.name} {found.version}: {found.files} files, {human_bytes(found.size)}, all as "
            f"they were released; sha256:{found.digest}"
        )
        if key is not None:
            click.echo("signed by the holder of this key")
        elif signed:
            click.echo("signed; whose signature it is, --public-key KEY checks")
