"""Where a recipe wants a release on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lite.errors import PackError

__all__ = ["HubPlan", "check_repo", "hub_plan"]


@dataclass(frozen=True)
class HubPlan:
    """Where a release goes.

    Attributes:
        repo: ``org/name``.
        private: Whether new repositories are private.
        per_format: Whether each format has a repository of its own, ``org/name-GGUF``.
        collection: Title of a collection that all of them are put into; empty for none.
    """

    repo: str
    private: bool = False
    per_format: bool = False
    collection: str = ""

    def repo_of(self, variant: str) -> str:
        """The repository of a format; of the model itself if it is empty."""
        return f"{self.repo}-{variant.upper()}" if variant else self.repo


def hub_plan(stated: str | Mapping[str, Any] | None) -> HubPlan | None:
    """What ``hub:`` of a recipe says: a repository, or a mapping."""
    if stated is None:
        return None
    if isinstance(stated, str):
        return HubPlan(stated)
    return HubPlan(**{key: value for key, value in stated.items() if value is not None})


def check_repo(name: str) -> str:
    """The name of a repository, if it can be one.

    Raises:
        PackError: It cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise PackError(f"'{name}' is no repository of the Hub", "Write ORG/NAME.")
    return name
