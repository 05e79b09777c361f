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
from mergekit_lite.release.card import lint_front_matter, render_card, standard_template
from mergekit_lite.release.draft import Asked, Draft, draft_release
from mergekit_lite.release.facts import card_values
from mergekit_lite.release.gather import Made
from mergekit_lite.release.manifest import MANIFEST, TEMPLATE, Entry, make_manifest, read_manifest
from mergekit_lite.release.papers import licence_texts, make_notice
from mergekit_lite.release.provenance import make_provenance
from mergekit_lite.release.sbom import make_sbom
from mergekit_lite.release.version import check_version, propose
from mergekit_lite.release.writer import ReleaseWriter, new_folder

__all__ = ["Release", "is_same", "make_release"]


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
    parts = made.parts()
    version = _version(made, made.releases(dist), asked)
    drafts = [draft_release(part, home, version, asked) for part in parts]
    missing = [
        draft for draft in drafts if not draft.made.releases(dist).joinpath(version).exists()
    ]
    # Of several, a run that was killed may have left the last ones out.
    there = [draft for draft in drafts if draft not in missing]
    for draft in there:
        folder = draft.made.releases(dist) / version
        if not missing or not is_same(draft, folder):
            raise _taken(draft, folder)
    return [
        _write(draft, folder) if draft in missing else _read(draft, folder)
        for draft, folder in ((d, d.made.releases(dist) / version) for d in drafts)
    ]


def _taken(draft: Draft, folder: Path) -> PackError:
    proposal = propose(folder.parent, draft.made)
    assert proposal is not None  # noqa: S101 (there is this one at least)
    return PackError(
        f"{folder}: version {draft.version} was released already; a version never changes",
        f"Since {proposal.before} {proposal.why}: --bump {proposal.part} makes it "
        f"{proposal.version}.",
    )


def _read(draft: Draft, folder: Path) -> Release:
    """A release that is there."""
    _, entries, digest = read_manifest(folder / MANIFEST)
    return Release(
        folder, draft.made.title, draft.version, digest, list(entries.values()), draft.notes,
        draft.warnings,
    )  # fmt: skip


def _write(draft: Draft, folder: Path) -> Release:
    made, version = draft.made, draft.version
    with new_folder(folder) as partial:
        writer = ReleaseWriter(partial, folder)
        for source, entry in made.files():
            writer.link(source, entry)
        for path, content in papers(draft, list(writer.entries)).items():
            writer.write(path, content)
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


def papers(draft: Draft, weights: Sequence[Entry]) -> dict[str, bytes]:
    """All that describes what was made, by path.

    Args:
        draft: The release.
        weights: Its files that are no papers.

    Raises:
        PackError: The card's template is wrong, or leaves out what must be shown.
    """
    found = {LOCK_NAME: to_json(_lock(draft))}
    if draft.recipe:
        found["recipe.yaml"] = yaml.safe_dump(dict(draft.recipe), sort_keys=True).encode()
    if draft.template is not None:
        found[TEMPLATE] = draft.template.encode()
    found |= dict(licence_texts(draft))
    found["NOTICE"] = make_notice(draft)
    values = card_values(draft, weights)
    card = render_card(draft.template or standard_template(), values)
    _check_card(card.decode(), values)
    found["README.md"] = card
    found["sbom.cdx.json"] = make_sbom(draft, weights)
    found["provenance.intoto.json"] = make_provenance(draft.made, draft.recipe, weights)
    return found


def is_same(draft: Draft, folder: Path) -> bool:
    """Whether a release that is there is what this one would be."""
    entries = read_manifest(folder / MANIFEST)[1]
    weights = [entry for _, entry in draft.made.files()]
    now = {entry.path: entry.sha256 for entry in weights}
    now |= {p: hashlib.sha256(c).hexdigest() for p, c in papers(draft, weights).items()}
    return now == {path: entry.sha256 for path, entry in entries.items()}


def _check_card(card: str, values: dict[str, Any]) -> None:
    """Whatever its template is, a card shows what licences want shown, and what was accepted.

    Raises:
        PackError: It does not.
    """
    for name in ("display", "accepted"):
        missing = [line for line in values[name] if line not in card]
        if missing:
            raise PackError(
                f"the template of the card leaves out what must be shown: {missing[0]}",
                f"Let it show every line of '{name}', as templates/card.md.jinja does.",
            )
    wrong = lint_front_matter(card)
    if wrong:
        raise PackError(
            f"the head of the card is none that the Hub reads: {'; '.join(wrong)}",
            "Begin the template with a line ---, then {{ front_matter }}---, as "
            "templates/card.md.jinja does.",
        )


def _lock(draft: Draft) -> dict[str, Any]:
    locks = {a.folder.name: draft.made.released_lock(a) for a in draft.made.artifacts}
    accepted = list(draft.verdict.accepted)
    return {
        "lock_version": 1,
        "kind": "release",
        "results": locks,
        **({"accepted_licenses": accepted} if accepted else {}),
    }
