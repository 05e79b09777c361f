"""pack release."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergekit_lite.cli.options import human_bytes
from mergekit_lite.text import plain

__all__ = ["command"]


@click.command("release", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--version", metavar="V", help="Semantic version.  [default: the recipe's]")
@click.option(
    "--template", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Template of the card, in Jinja; it is rendered in a sandbox.",
)  # fmt: skip
@click.option("--production", is_flag=True, help="Make an error of what a good release would have.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    name: str | None,
    version: str | None,
    template: Path | None,
    production: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Release what was made under NAME: gathered, described and sealed below dist/NAME/release.

    The release holds the model and its quantized files, a card, licence texts and NOTICE, the
    recipe, pack.lock, a bill of materials (CycloneDX), provenance (SLSA), and MANIFEST.json with
    the digest of every file. Weights are linked, not copied. The same results give the same
    release.

    Without NAME: what was made last. Licences that conflict stop it; see `pack licenses`.
    """
    from mergekit_lite.release.bundle import make_release
    from mergekit_lite.release.gather import gather, last_name

    dist = Path("dist")
    made = gather(dist, name or last_name(dist))
    text = template.read_text("utf-8") if template is not None else None
    released = make_release(made, dist, Path(), version, text, production)
    size = sum(entry.size for entry in released.entries)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(released.folder),
                    "name": released.name,
                    "version": released.version,
                    "digest": released.digest,
                    "files": len(released.entries) + 1,
                    "bytes": size,
                    "notes": list(released.notes),
                    "warnings": list(released.warnings),
                }
            )
        )
        return
    for warning in released.warnings:
        click.secho(plain(f"warning: {warning}"), fg="yellow", err=True)
    if quiet:
        return
    for note in released.notes:
        click.echo(plain(f"note: {note}"), err=True)
    click.echo(
        f"{released.name} {released.version}: {len(released.entries) + 1} files, "
        f"{human_bytes(size)}, sha256:{released.digest} → {released.folder}"
    )
