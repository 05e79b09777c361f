"""What a model's card and licence files say, as far as it matters for what is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Card", "read_card"]

_LIMIT = 1 << 18
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """The front matter of a README.md, and the licence.

    Attributes:
        licence: As the card states it, else the name of the licence's file; None without either.
        base: Models that it was made from.
        notes: What is wrong with it.
        data: The front matter as it stands there.
    """

    licence: str | None
    base: tuple[str, ...]
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def texts(self, key: str) -> tuple[str, ...]:
        """A value of the front matter that is a text or a list of texts."""
        return _texts(self.data.get(key))


def read_card(folder: Path | None) -> Card:
    """Read the card of a model or an adapter; a broken one is noted, not an error."""
    if folder is None or not folder.is_dir():
        return Card(None, ())
    data, notes = _front_matter(folder / "README.md")
    stated = data.get("license")
    if stated == "other":
        stated = data.get("license_name") or stated
    licences = _texts(stated)
    files = sorted(p.name for pattern in ("LICEN[CS]E*", "COPYING*") for p in folder.glob(pattern))
    licence = ", ".join(licences) or (f"see {files[0]}" if files else None)
    return Card(licence, _texts(data.get("base_model")), notes, data)


def _front_matter(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    if not path.is_file():
        return {}, ()
    with path.open(encoding="utf-8", errors="replace") as file:
        match = _FRONT.match(file.read(_LIMIT))
    if match is None:
        return {}, ()
    import yaml

    try:
        data = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, (f"the card's front matter is not valid YAML ({path.name})",)
    return (data, ()) if isinstance(data, dict) else ({}, ())


def _texts(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, str) and v)
