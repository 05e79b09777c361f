"""The parents of a release: what its locks name, with licences and where their papers lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.analyse.look import look_at
from mergekit_lite.errors import PackError
from mergekit_lite.release.gather import ABOUT, Made
from mergekit_lite.release.licences.combine import Parent
from mergekit_lite.release.licences.find import find_parent, licence_files, standard_text

__all__ = ["ParentSource", "find_sources", "only_licence"]


@dataclass(frozen=True)
class ParentSource:
    """A parent, as a lock names it, and where its small files lie."""

    entry: Mapping[str, Any]
    parent: Parent
    folder: Path | None

    @property
    def digest(self) -> str:
        """Of the list of its files' digests."""
        files = sorted(f"{f['sha256']}  {f['path']}" for f in self.entry["files"])
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    @property
    def lacks_text(self) -> bool:
        """Whether its licence wants its text to go along, and nobody has it."""
        wanted = [licence for licence in self.parent.terms if licence.copy]
        if not wanted or licence_files(self.folder):
            return False
        return any(standard_text(licence) is None for licence in wanted)


def find_sources(
    made: Made, home: Path, by_recipe: Mapping[str, str]
) -> tuple[list[ParentSource], list[str]]:
    """The parents of all results, but for what was made on the way."""
    own = {entry.sha256 for artifact in made.artifacts for entry in artifact.files}
    found: dict[str, ParentSource] = {}
    notes: list[str] = []
    for artifact in made.artifacts:
        if artifact.kind in ABOUT:  # what was compared with goes into nothing
            continue
        for entry in artifact.lock.get("inputs", []):
            reference = entry["model"]
            digests = {file["sha256"] for file in entry["files"]}
            if reference in found or digests <= own:
                continue
            folder, config = _place(reference, home)
            kind = "adapter" if _is_adapter(entry) else "model"
            parent, more = find_parent(reference, folder, config, by_recipe.get(reference), kind)
            notes += more
            found[reference] = ParentSource(entry, parent, folder)
    return [found[name] for name in sorted(found)], notes


def _is_adapter(entry: Mapping[str, Any]) -> bool:
    names = {file["path"] for file in entry["files"]}
    return "adapter_config.json" in names and "config.json" not in names


def _place(reference: str, home: Path) -> tuple[Path | None, Mapping[str, object]]:
    try:
        source = look_at(reference, home)
    except PackError:
        return None, {}
    source.checkpoint.close()
    return source.checkpoint.folder, source.checkpoint.config


def only_licence(sources: Sequence[ParentSource]) -> str | None:
    """The licence of all parents, if they have one and the same."""
    every = {s.parent.terms for s in sources}
    terms = every.pop() if len(every) == 1 else ()
    return " AND ".join(licence.id for licence in terms) or None
