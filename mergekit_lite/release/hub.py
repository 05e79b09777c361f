"""Where a recipe wants a release on the Hub, and what goes wrong there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lite.errors import PackError

__all__ = ["HubPlan", "check_repo", "hub_error", "hub_plan"]


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


def hub_error(error: Exception, repo: str) -> PackError:
    """What went wrong, without the client's own words where they may hold a token."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    again = "Run the same command again; what is done is not done twice."
    if status in (401, 403):
        return PackError(
            f"{repo}: the Hub refuses you ({status})",
            "Log in with a token that may write there: hf auth login",
        )
    if status in (409, 412):
        return PackError(
            f"{repo}: somebody else changed it meanwhile ({status}); nothing was changed",
            again,
        )
    if status is not None:
        return PackError(f"{repo}: the Hub answers {status}; see the next step", again)
    return PackError(
        f"{repo}: the Hub cannot be reached ({type(error).__name__})",
        "Check the network. " + again,
    )
