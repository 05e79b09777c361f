"""The licence of a parent: as the recipe states it, else its card, its config, its LICENSE file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.checkpoint.card import read_card
from mergekit_lite.errors import nearest
from mergekit_lite.release.licences.combine import Parent
from mergekit_lite.release.licences.expression import read_licences
from mergekit_lite.release.licences.table import Licence, licences
from mergekit_lite.resources import resource_folder

__all__ = [
    "Stated",
    "data_sets",
    "find_data",
    "find_parent",
    "licence_files",
    "papers_of",
    "standard_text",
]

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
    read = [(stated, *read_licences(stated.name)) for stated in every]
    known = [(stated, found, whole) for stated, found, whole in read if found]
    notes = []
    if len({found for _, found, _ in known}) > 1:
        said = ", ".join(f"{_ids(found)} in its {stated.where}" for stated, found, _ in known)
        notes.append(
            f"{name}: its licence is stated differently: {said}; {_ids(known[0][1])} is taken"
        )
    if not known:
        return Parent(name, None, every[0].name if every else "", kind), notes
    stated, (licence, *also), whole = known[0]
    parent = Parent(name, licence, stated.name, kind, also=tuple(also), partly=not whole)
    return parent, notes


def _ids(licences: Sequence[Licence]) -> str:
    return " AND ".join(licence.id for licence in licences)


def data_sets(folder: Path | None) -> tuple[str, ...]:
    """What a model was trained on, by its card."""
    return read_card(folder).texts("datasets")


def find_data(
    parents: Mapping[str, Path | None], by_recipe: Mapping[str, str]
) -> tuple[list[Parent], list[str]]:
    """The data sets that parents' cards name, as far as somebody states their licence.

    Args:
        parents: Where their small files lie, by name.
        by_recipe: Licences that the recipe states, by name.

    Returns:
        Data sets with a licence, and what should be known.
    """
    named = sorted({one for folder in parents.values() for one in data_sets(folder)})
    found, notes = [], []
    for name, stated in by_recipe.items():
        if name in named:
            known, whole = read_licences(stated)
            first, also = (known[0], known[1:]) if known else (None, ())
            found.append(Parent(name, first, stated, "data", also=also, partly=not whole))
        elif name not in parents:
            near = nearest(name, [*parents, *named])
            notes.append(f"licenses: '{name}' is neither a model nor a data set of these{near}")
    silent = [name for name in named if name not in by_recipe]
    if silent:
        listed = ", ".join(silent[:6]) + (f" and {len(silent) - 6} more" if len(silent) > 6 else "")
        notes.append(f"licences of data sets are not known: {listed} (licenses: in the recipe)")
    return found, notes


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
        if "commons clause" in plain or "commons-clause" in plain:  # a licence, and less than it
            found.append(Stated(path.name, "commons-clause"))
            continue
        rows = [row for row in licences().values() if row.text]
        named = next((row.id for row in rows if re.search(row.text, plain)), None)
        if named is not None:
            found.append(Stated(path.name, named))
    return [one for one in found if one.name != "other"]


def licence_files(folder: Path | None) -> list[Path]:
    """The files of a model that hold licence texts, sorted."""
    found = papers_of(folder, r"licen[cs]e|copying")
    return sorted(found, key=lambda path: ("model" not in path.name.lower(), path.name))


def papers_of(folder: Path | None, pattern: str) -> list[Path]:
    """Files of a model whose names begin so, in any case; none that lead elsewhere by a link.

    Args:
        folder: Of the model; in the Hub's cache its files are links to blobs beside it.
        pattern: Regular expression.
    """
    if folder is None or not folder.is_dir():
        return []
    whole = folder.resolve()
    roots = [whole, *([whole.parents[1]] if whole.parent.name == "snapshots" else [])]
    return sorted(
        path for path in folder.iterdir()
        if re.match(pattern, path.name, re.IGNORECASE) and path.is_file()
        and any(path.resolve().is_relative_to(root) for root in roots)
    )  # fmt: skip


def standard_text(licence: Licence) -> bytes | None:
    """The text of a licence, as its publisher has it; None if pack does not hold it."""
    if licence.spdx is None:
        return None
    path = resource_folder("templates") / "licenses" / f"{licence.spdx}.txt"
    return path.read_bytes() if path.is_file() else None
