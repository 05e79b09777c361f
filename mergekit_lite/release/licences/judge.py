"""Licences of what a recipe or a command line names, from small files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.analyse.look import holds_adapter, look_at
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import read_recipe
from mergekit_lite.release.licences.combine import Parent, Verdict, combine
from mergekit_lite.release.licences.find import find_data, find_parent

__all__ = ["Judged", "judge_models", "judge_recipe", "judge_sources"]


@dataclass(frozen=True)
class Judged:
    """What was found.

    Attributes:
        parents: What goes in.
        verdict: What follows.
        notes: What the user should know.
    """

    parents: Sequence[Parent]
    verdict: Verdict
    notes: Sequence[str]

    def describe(self) -> dict[str, Any]:
        """As data for JSON."""
        return {
            "parents": [
                {
                    "name": parent.name,
                    "kind": parent.kind,
                    "licence": " AND ".join(one.id for one in parent.terms) or None,
                    "stated": parent.stated,
                }
                for parent in self.parents
            ],
            "obligations": [asdict(obligation) for obligation in self.verdict.obligations],
            "conflicts": [asdict(conflict) for conflict in self.verdict.conflicts],
            "accepted": list(self.verdict.accepted),
            "release_as": list(self.verdict.release_as),
            "notes": list(self.notes),
        }


def judge_recipe(
    path: Path,
    released_as: str | None = None,
    name: str | None = None,
    accepted: Mapping[str, str] | None = None,
) -> Judged:
    """Judge what a recipe makes.

    Args:
        path: The recipe's file.
        released_as: Licence of the release, instead of the recipe's.
        name: Of the release, instead of the recipe's, where the recipe states one.
        accepted: Reasons to accept licences, beside the recipe's.

    Raises:
        PackError: The recipe is wrong, or a model is not there.
    """
    recipe = read_recipe(path, METHODS, ALIASES)
    names = [entry.model for entry in recipe.models or []]
    names += [source.model for part in recipe.slices or [] for source in part.sources]
    names += [recipe.base_model] if recipe.base_model else []
    stated = name or (recipe.name if recipe.name != path.stem else None)
    return judge_models(
        list(dict.fromkeys(names)), path.parent, released_as or recipe.license, stated,
        recipe.licenses or {}, {**(recipe.accept_licenses or {}), **(accepted or {})},
    )  # fmt: skip


def judge_models(
    names: Sequence[str],
    home: Path,
    released_as: str | None = None,
    name: str | None = None,
    by_recipe: Mapping[str, str] | None = None,
    accepted: Mapping[str, str] | None = None,
) -> Judged:
    """Judge what is made of models.

    Raises:
        PackError: A model is not there.
    """
    sources: list[Source] = []
    try:
        for reference in names:
            sources.append(look_at(reference, home))  # noqa: PERF401 (closed on an error)
        return judge_sources(sources, released_as, name, by_recipe, accepted)
    finally:
        for source in sources:
            for part in source.sources:
                part.checkpoint.close()


def judge_sources(
    sources: Sequence[Source],
    released_as: str | None = None,
    name: str | None = None,
    by_recipe: Mapping[str, str] | None = None,
    accepted: Mapping[str, str] | None = None,
) -> Judged:
    """Judge what is made of models that are open."""
    parents: dict[str, Parent] = {}
    notes: list[str] = []
    for source in sources:
        for part in source.sources:
            kind = "adapter" if holds_adapter(part) or part in source.parts[1:] else "model"
            parent, found = _parent(part, kind, by_recipe or {})
            if part.reference not in parents:
                parents[part.reference] = parent
                notes += found
    if all(parent.kind == "adapter" for parent in parents.values()):
        notes += [
            f"{part.reference}: was trained on {base}, whose licence binds it too; see: pack "
            f"licenses {base} {part.reference}"
            for source in sources for part in source.sources
            if isinstance(base := part.checkpoint.config.get("base_model_name_or_path"), str)
        ]  # fmt: skip
    folders = {part.reference: part.checkpoint.folder for s in sources for part in s.sources}
    data, found = find_data(folders, by_recipe or {})
    notes += found
    every = [*parents.values(), *data]
    return Judged(every, combine(every, released_as, name, accepted), notes)


def _parent(source: Source, kind: str, by_recipe: Mapping[str, str]) -> tuple[Parent, list[str]]:
    stated = by_recipe.get(source.reference)
    folder = source.checkpoint.folder
    return find_parent(source.reference, folder, source.checkpoint.config, stated, kind)
