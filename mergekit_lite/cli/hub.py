"""What a command line says of the Hub, beside a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergekit_lite.release.hub import HubPlan

__all__ = ["planned"]


def planned(repo: str, recipe: Mapping[str, Any], private: bool = False) -> HubPlan:
    """Where a release goes.

    Args:
        repo: ``org/name`` of the command line; empty for the recipe's.
        recipe: As data.
        private: Whether new repositories are private, whatever the recipe says.

    Raises:
        click.UsageError: Neither says where.
    """
    from mergekit_lite.release.hub import HubPlan, check_repo, hub_plan

    plan = hub_plan(recipe.get("hub"))
    chosen = repo or (plan.repo if plan else "")
    if not chosen:
        raise click.UsageError("say where: --push-hub ORG/NAME, or hub: ORG/NAME in the recipe")
    plan = replace(plan or HubPlan(chosen), repo=check_repo(chosen))
    return replace(plan, private=True) if private else plan
