"""pack verify."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from mergekit_lite.text import human_bytes

__all__ = ["command"]


@click.command("verify", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("release")
@click.option(
    "--public-key", "key", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="KEY", help="Check the signature, too, with this public key (PEM).",
)  # fmt: skip
@click.option("--identity", metavar="WHO", help="Check a signature of Sigstore: who signed.")
@click.option("--issuer", metavar="URL", help="With --identity: who vouched for it.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Files hashed side by side.  [default: cores]"
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    release: str,
    key: Path | None,
    identity: str | None,
    issuer: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a release: files against the manifest, papers against files.

    RELEASE is a folder, a .tar or .tar.zst, an OCI image layout, org/name[@revision] on the Hub, or
    oci://REGISTRY/NAME:TAG. All that does not hold is named: changed, missing and extra files,
    papers that speak of others.
    """
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import default_threads
    from mergekit_lite.release.manifest import MANIFEST, SIGNATURE, read_manifest
    from mergekit_lite.release.place import placed
    from mergekit_lite.release.sign import Signer, check_signature
    from mergekit_lite.release.verify import verify_release

    if (identity is None) != (issuer is None) or (key is not None and identity is not None):
        raise click.UsageError("give --public-key, or --identity with --issuer")
    with placed(release) as place, make_progress(quiet or as_json) as progress:
        folder = place.folder
        total = sum(entry.size for entry in read_manifest(folder / MANIFEST)[1].values())
        progress.begin("Verify", total)
        found = verify_release(
            folder, threads or default_threads(), progress.advance, place.links_into, place.ignored
        )
        checked = key is not None or identity is not None
        wrong = (
            check_signature(place, Signer(key, identity or "", issuer or "")) if checked else None
        )
        signed = (folder / SIGNATURE).is_file()
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
            f"{release}: {len(found.problems)} thing{'s' * (len(found.problems) != 1)} "
            f"do{'es' * (len(found.problems) == 1)} not hold:{listed}",
            "Give the public key of whoever should have signed it."
            if wrong is not None and len(found.problems) == 1
            else "Do not use this release; get it again from whoever made it.",
        )
    if not quiet and not as_json:
        click.echo(
            f"{found.name} {found.version}: {found.files} files, {human_bytes(found.size)}, all as "
            f"they were released; sha256:{found.digest}"
        )
        if checked:
            click.echo(f"signed by {identity or 'the holder of this key'}")
        elif signed:
            click.echo("signed; whose signature it is, --public-key KEY or --identity WHO checks")
