"""The licence of a parent: as the recipe states it, else its card, its config, its LICENSE file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.checkpoint.card import read_card
from mergekit_lite.release.licences.combine import Parent
from mergekit_lite.release.licences.expression import find_licences
from mergekit_lite.release.licences.table import Licence, licences
from mergekit_lite.resources import resource_folder

__all__ = ["Stated", "find_parent", "licence_files", "standard_text"]

_LIMIT = 1 << 16


@dataclass(frozen=True)
class Stated:
    """Where a licence is stated.

    Attributes:
        where: ``recipe``, ``card``, ``config`` or the name of a file.
        name: As it stands there.
    """

    where: str
    name: str


def find_parent(
    name: str,
    folder: Path | None,
    config: Mapping[str, object],
    by_recipe: str | None = None,
    kind: str = "model",
) -> tuple[Parent, list[str]]:
    """A parent with its licence, and what should be known of how it was found.

    Args:
        name: As the user wrote it.
        folder: Where its small files lie; None for a bare file.
        config: Contents of its config.json.
        by_recipe: What the recipe says that its licence is.
        kind: ``model``, ``adapter`` or ``data``.
    """
    every = [*([Stated("recipe", by_recipe)] if by_recipe else []), *_stated(folder, config)]
    known = [(stated, found) for stated in every if (found := find_licences(stated.name))]
    notes = []
    if len({found for _, found in known}) > 1:
        said = ", ".join(f"{_ids(found)} in its {stated.where}" for stated, found in known)
        notes.append(
            f"{name}: its licence is stated differently: {said}; {_ids(known[0][1])} is taken"
        )
    if not known:
        return Parent(name, None, every[0].name if every else "", kind), notes
    stated, (licence, *also) = known[0]
    return Parent(name, licence, stated.name, kind, also=tuple(also)), notes


def _ids(licences: Sequence[Licence]) -> str:
    return " AND ".join(licence.id for licence in licences)


def _stated(folder: Path | None, config: Mapping[str, object]) -> list[Stated]:
    """What its card, its config and its licence file say, in this order."""
    found = []
    if folder is not None and folder.is_dir():
        card = read_card(folder)
        names = card.texts("license_name") or () if card.texts("license") == ("other",) else ()
        found += [Stated("card", name) for name in names]
        stated = [name for name in card.texts("license") if name != "other"]
        if stated:  # several hold together
            found.append(Stated("card", " AND ".join(stated)))
    in_config = config.get("license")
    if isinstance(in_config, str) and in_config:
        found.append(Stated("config", in_config))
    for path in licence_files(folder):
        text = path.read_bytes()[:_LIMIT].decode("utf-8", "replace").lower()
        plain = re.sub(r"\s+", " ", text)
        rows = [row for row in licences().values() if row.text]
        named = next((row.id for row in rows if re.search(row.text, plain)), None)
        if named is not None:
            found.append(Stated(path.name, named))
    return [one for one in found if one.name != "other"]


def licence_files(folder: Path | None) -> list[Path]:
    """The files of a model that hold licence texts, sorted."""
    if folder is None or not folder.is_dir():
        return []
    patterns = ("LICEN[CS]E*", "COPYING*", "licen[cs]e*")
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def standard_text(licence: Licence) -> bytes | None:
    """The text of a licence, as its publisher has it; None if pack does not hold it."""
    if licence.spdx is None:
        return None
    path = resource_folder("templates") / "licenses" / f"{licence.spdx}.txt"
    return path.read_bytes() if path.is_file() else None
