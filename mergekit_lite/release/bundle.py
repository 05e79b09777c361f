"""A release: what was made under a name, gathered, described and sealed, under a version.

Weights are linked, not copied, and not read: their digests were computed as they were written. All
else follows from locks, cards and licences, so the same results give the same release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.errors import PackError
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.merge.writer import refuse_existing
from mergekit_lite.release.card import render_card, standard_template
from mergekit_lite.release.draft import TEMPLATE, Asked, Draft, draft_release
from mergekit_lite.release.facts import card_values
from mergekit_lite.release.gather import Made
from mergekit_lite.release.hub import hub_plan
from mergekit_lite.release.manifest import Entry, make_manifest
from mergekit_lite.release.papers import licence_texts, make_notice
from mergekit_lite.release.provenance import make_provenance
from mergekit_lite.release.sbom import make_sbom
from mergekit_lite.release.version import check_version, propose
from mergekit_lite.release.writer import ReleaseWriter, new_folder

__all__ = ["Release", "make_release"]


@dataclass(frozen=True)
class Release:
    """What was released.

    Attributes:
        folder: Where it lies.
        name: Of the release.
        version: Of the release.
        digest: Of the release: that of its manifest.
        entries: Its files but the manifest.
        notes: What the user should know.
        warnings: What a good release would have.
    """

    folder: Path
    name: str
    version: str
    digest: str
    entries: Sequence[Entry]
    notes: Sequence[str]
    warnings: Sequence[str]


def make_release(made: Made, dist: Path, home: Path, asked: Asked) -> list[Release]:
    """Make a release, which appears when it is whole.

    Args:
        made: What was made.
        dist: Folder of all results.
        home: Folder that relative paths of locks and recipe start from.
        asked: What the recipe does not say.

    Returns:
        It; and after it one for each format that is to have a repository of its own.

    Raises:
        PackError: Licences conflict, the version exists, or something is missing.
    """
    plan = hub_plan(made.recipe.get("hub"))
    parts = made.parts(per_format=plan is not None and plan.per_format)
    version = _version(made, made.releases(dist), asked)
    for part in parts:
        _refuse_version(part, dist, version)
    drafts = [draft_release(part, home, version, asked) for part in parts]
    return [_write(draft, draft.made.releases(dist) / version) for draft in drafts]


def _refuse_version(made: Made, dist: Path, version: str) -> None:
    releases = made.releases(dist)
    folder = releases / version
    if folder.exists():
        proposal = propose(releases, made)
        assert proposal is not None  # noqa: S101 (there is this one at least)
        raise PackError(
            f"{folder}: version {version} was released already; a version never changes",
            f"Since {proposal.before} {proposal.why}: --bump {proposal.part} makes it "
            f"{proposal.version}.",
        )
    refuse_existing(folder, force=False)


def _write(draft: Draft, folder: Path) -> Release:
    made, version = draft.made, draft.version
    with new_folder(folder) as partial:
        writer = ReleaseWriter(partial, folder)
        for artifact in made.artifacts:
            for entry in artifact.files:
                path = made.place(artifact, entry.path)
                writer.link(artifact.folder / entry.path, Entry(path, entry.size, entry.sha256))
        _papers(draft, writer)
        manifest = make_manifest(made.title, version, writer.entries)
        writer.seal(manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    return Release(folder, made.title, version, digest, writer.entries, draft.notes, draft.warnings)


def _version(made: Made, releases: Path, asked: Asked) -> str:
    version = asked.version or made.recipe.get("version")
    if version is not None:
        return check_version(version)
    proposal = propose(releases, made)
    raise PackError(
        "the release has no version",
        "Give one: --version 1.0.0, or version: in the recipe." if proposal is None else
        f"Since {proposal.before} {proposal.why}: --bump {proposal.part} makes it "
        f"{proposal.version}; or give --version.",
    )  # fmt: skip


def _papers(draft: Draft, writer: ReleaseWriter) -> None:
    """Write all that describes the weights."""
    made = draft.made
    weights = list(writer.entries)
    writer.write(LOCK_NAME, to_json(_lock(draft)))
    if draft.recipe:
        writer.write("recipe.yaml", yaml.safe_dump(dict(draft.recipe), sort_keys=True).encode())
    if draft.template is not None:
        writer.write(TEMPLATE, draft.template.encode())
    for path, content in licence_texts(draft):
        writer.write(path, content)
    writer.write("NOTICE", make_notice(draft))
    values = card_values(draft, weights)
    writer.write("README.md", render_card(draft.template or standard_template(), values))
    writer.write("sbom.cdx.json", make_sbom(draft, weights))
    writer.write("provenance.intoto.json", make_provenance(made, draft.recipe, weights))


def _lock(draft: Draft) -> dict[str, Any]:
    locks = {a.folder.name: draft.made.released_lock(a) for a in draft.made.artifacts}
    accepted = list(draft.verdict.accepted)
    return {
        "lock_version": 1,
        "kind": "release",
        "results": locks,
        **({"accepted_licenses": accepted} if accepted else {}),
    }
