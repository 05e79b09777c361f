"""The table of model licences: what each asks of whoever passes a derivative on.

The table itself is data, licences.yaml beside this file; each row names the address of its text and
the clause that it rests on. It is no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["KEEP", "Licence", "find_licence", "hub_ids", "licences"]

KEEP = "keep"
"""Value of `Licence.notice`: notices of others are kept."""


@dataclass(frozen=True)
class Licence:
    """One licence.

    Attributes:
        id: The Hub's id, or one like it.
        title: Its full name.
        kind: ``permissive``, ``copyleft``, ``limited`` or ``noncommercial``.
        url: Where its text is.
        clause: What most of this rests on.
        spdx: SPDX's id; None if it has none.
        aliases: Other ids of it.
        family: Of models, where it matters.
        copy: Whether its text goes along.
        link: Whether a link to it is enough.
        notice: A line for NOTICE, or `KEEP`; empty for nothing.
        changes: Whether changes must be marked.
        display: A line that must be shown; empty for none.
        prefix: How a derivative's name must begin; empty for anyhow.
        not_first: A word that the name must not begin with; empty for none.
        policy: Address of acceptable uses that are passed on; empty for none.
        restrictions: Whether use restrictions are passed on as a term.
        users: Most monthly users without asking; 0 for no limit.
        improves_others: Whether other language models may be improved with it.
        commercial: Whether it may be used commercially.
        same: Whether derivatives go under the same licence.
        source: Whether they go with their source.
        no_more: Whether no further restrictions may be added.
        limit: Another limit, in words.
        text: Regular expression of words that tell its text from others'; empty for none.
    """

    id: str
    title: str
    kind: str
    url: str
    clause: str
    spdx: str | None = None
    aliases: tuple[str, ...] = ()
    family: str = ""
    copy: bool = False
    link: bool = False
    notice: str = ""
    changes: bool = False
    display: str = ""
    prefix: str = ""
    not_first: str = ""
    policy: str = ""
    restrictions: bool = False
    users: int = 0
    improves_others: bool = True
    commercial: bool = True
    same: bool = False
    source: bool = False
    no_more: bool = False
    limit: str = ""
    text: str = ""

    @property
    def limits(self) -> bool:
        """Whether it restricts use beyond what free licences do."""
        return bool(
            self.policy or self.restrictions or self.users or self.prefix or self.limit
            or not self.commercial or not self.improves_others
        )  # fmt: skip


@cache
def licences() -> Mapping[str, Licence]:
    """The table, by id."""
    import yaml

    rows: list[dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("licences.yaml").read_text("utf-8")
    )
    known = {field.name for field in fields(Licence)}
    found = {}
    for row in rows:
        values = {"kind" if key == "class" else key: value for key, value in row.items()}
        values["aliases"] = tuple(values.get("aliases", ()))
        assert values.keys() <= known, values.keys() - known  # noqa: S101 (our own file)
        found[row["id"]] = Licence(**values)
    return found


@cache
def hub_ids() -> frozenset[str]:
    """Licences that the Hub has a word for."""
    import yaml

    return frozenset(yaml.safe_load(Path(__file__).with_name("hub.yaml").read_text("utf-8")))


def find_licence(name: str) -> Licence | None:
    """A licence by its id on the Hub, SPDX's id, or another name of it; None if it is not known."""
    return _names().get(_key(name))


@cache
def _names() -> Mapping[str, Licence]:
    found: dict[str, Licence] = {}
    for licence in licences().values():
        for name in (licence.id, licence.spdx or licence.id, licence.title, *licence.aliases):
            found[_key(name)] = licence
    for identifier in ("gpl-3.0", "agpl-3.0"):
        found[_key(f"{identifier}-or-later")] = licences()[identifier]
    return found


def _key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())
