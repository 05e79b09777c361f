"""pack release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.cli.hub import planned
from mergekit_lite.cli.options import ACCEPT, PROFILE, REASON, accepted_licences
from mergekit_lite.release.manifest import MANIFEST, SIGNATURE, read_manifest
from mergekit_lite.text import human_bytes, plain

if TYPE_CHECKING:
    from mergekit_lite.release.bundle import Release
    from mergekit_lite.release.gather import Made
    from mergekit_lite.release.push import Pushed

__all__ = ["command"]


@click.command("release", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--version", metavar="V", help="Semantic version.  [default: the recipe's]")
@click.option(
    "--bump", type=click.Choice(["major", "minor", "patch", "auto"]),
    help="The next version; auto: by what changed (base or architecture, files, papers alone).",
)  # fmt: skip
@click.option(
    "--template", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Template of the card, in Jinja; it is rendered in a sandbox.",
)  # fmt: skip
@PROFILE
@ACCEPT
@REASON
@click.option(
    "--sign", "key", metavar="KEY",
    help="Sign it with a private key of an elliptic curve (PEM), or without one: sigstore.",
)  # fmt: skip
@click.option(
    "--archive", is_flag=False, flag_value="tar", type=click.Choice(["tar", "tar.zst"]),
    help="Write it as one file beside its folder, too.",
)  # fmt: skip
@click.option("--oci", is_flag=True, help="Write it as an OCI image layout beside it, too.")
@click.option(
    "--push-oci", "registry", metavar="REGISTRY/NAME",
    help="Push it to an OCI registry (CNCF ModelPack); the version is the tag.",
)  # fmt: skip
@click.option(
    "--push-hub", "repo", is_flag=False, flag_value="", default=None, metavar="[ORG/NAME]",
    help="Push it to the Hub: one commit, then a tag.  [default: hub: of the recipe]",
)  # fmt: skip
@click.option("--private", is_flag=True, help="With --push-hub: a new repository is private.")
@click.option("--pull-request", is_flag=True, help="With --push-hub: open a pull request.")
@click.option("--dry-run", is_flag=True, help="Show what a push would send.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    name: str | None,
    version: str | None,
    bump: str | None,
    template: Path | None,
    profile: str | None,
    accept: tuple[str, ...],
    reasons: tuple[str, ...],
    key: str | None,
    archive: str | None,
    oci: bool,
    registry: str | None,
    repo: str | None,
    private: bool,
    pull_request: bool,
    dry_run: bool,
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
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import default_threads
    from mergekit_lite.release.archive import pack_archive
    from mergekit_lite.release.bundle import make_release
    from mergekit_lite.release.draft import Asked
    from mergekit_lite.release.gather import gather, last_name
    from mergekit_lite.release.oci import write_layout
    from mergekit_lite.release.push import describe, push_all, refuse_secrets
    from mergekit_lite.release.push_oci import push_image
    from mergekit_lite.release.sign import key_file, sign_release
    from mergekit_lite.release.verify import require_whole

    if version and bump:
        raise click.UsageError("give --version or --bump, not both")
    dist = Path("dist")
    made = gather(dist, name or last_name(dist))
    if dry_run and repo is None and registry is None:
        raise click.UsageError("--dry-run goes with --push-hub or --push-oci")
    signer = key_file(key) if key is not None else None
    if repo is None and (private or pull_request):
        raise click.UsageError("--private and --pull-request go with --push-hub")
    plan = None if repo is None else planned(repo, made.recipe, private)
    text = template.read_text("utf-8") if template is not None else None
    chosen = version or (_bumped(made, dist, bump) if bump else made.recipe.get("version"))
    parts = made.parts()
    folders = [part.releases(dist) / str(chosen) for part in parts]
    more = plan is not None or any((key, archive, oci, registry))
    released: list[Release] = []
    if not all((folder / MANIFEST).is_file() for folder in folders) or not more:
        asked = Asked(chosen, text, profile, accepted_licences(accept, reasons))
        released = make_release(made, dist, Path(), asked)
        folders = [one.folder for one in released]
        for warning in released[0].warnings:
            click.secho(plain(f"warning: {warning}"), fg="yellow", err=True)
        for note in released[0].notes if not quiet else ():
            click.echo(plain(f"note: {note}"), err=True)
    elif bump or template or profile or accept:
        raise PackError(
            f"{folders[0]}: version {chosen} was released already; a version never changes",
            "Leave out --template, --profile and --accept-license, or give --bump auto.",
        )
    if archive or oci:
        for folder in folders:
            refuse_secrets(folder)
    done: list[str] = []
    for part, folder in zip(parts, folders, strict=True):
        if not released and (key or archive or oci):
            require_whole(folder, default_threads())
        if key is not None:
            now = sign_release(folder, signer)
            done.append(f"signature{'' if now else ', kept'} → {folder / SIGNATURE}")
        for kind in (archive, "oci" if oci else None):
            if kind is not None:
                path = folder.with_name(f"{part.title}-{chosen}.{kind}")
                (write_layout if kind == "oci" else pack_archive)(folder, path)
                done.append(f"{kind} → {path}")
    pushed: list[Pushed] = []
    with make_progress(quiet or as_json) as progress:
        if plan is not None:
            pushed += push_all(
                folders, plan, made.name, default_threads(), progress, pull_request, dry_run
            )
        for part, folder in zip(parts, folders, strict=True) if registry is not None else ():
            place = f"{registry}-{part.variant}" if part.variant else str(registry)
            pushed.append(push_image(folder, place, default_threads(), progress, dry_run))
    if as_json:
        first = _describe(folders[0], released[0] if released else None)
        more_data = {"pushed": [describe(one) for one in pushed]} if pushed else {}
        click.echo(json.dumps({**first, **more_data}))
    elif not quiet:
        _show(folders, released, pushed)
        for line in done:
            click.echo(plain(line))


def _bumped(made: Made, dist: Path, bump: str) -> str:
    from mergekit_lite.release.version import propose

    proposal = propose(dist / made.name / "release", made, None if bump == "auto" else bump)
    if proposal is None:
        raise click.UsageError("nothing was released yet; give the first version: --version 1.0.0")
    click.echo(plain(f"{proposal.before} → {proposal.version}: {proposal.why}"), err=True)
    return proposal.version


def _describe(folder: Path, released: Release | None) -> dict[str, Any]:
    document, entries, digest = read_manifest(folder / MANIFEST)
    return {
        "folder": str(folder),
        "name": document["name"],
        "version": document["version"],
        "digest": digest,
        "files": len(entries) + 1,
        "bytes": sum(entry.size for entry in entries.values()),
        "notes": list(released.notes) if released else [],
        "warnings": list(released.warnings) if released else [],
    }


def _show(folders: list[Path], released: list[Release], pushed: list[Pushed]) -> None:
    for one in released:
        found = _describe(one.folder, one)
        click.echo(
            f"{found['name']} {found['version']}: {found['files']} files, "
            f"{human_bytes(found['bytes'])}, sha256:{found['digest']} → {one.folder}"
        )
    for sent, folder in zip(pushed, [*folders, *folders], strict=False):
        size = human_bytes(_describe(folder, None)["bytes"])
        for path in sent.removed:
            click.echo(plain(f"removed there: {path}"))
        what = f", {len(sent.added)} files, {size}" if sent.added else ""
        where = f" → {sent.url}" if sent.url else ""
        click.echo(plain(f"{sent.repo} {sent.tag}{what}: {sent.done}{where}"))
