"""A recipe at a glance: what it would merge, and whether that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.analyse.adapter import view_adapter
from mergekit_lite.analyse.inspect import view_model
from mergekit_lite.analyse.look import holds_adapter, look_at
from mergekit_lite.errors import PackError
from mergekit_lite.recipe import Recipe
from mergekit_lite.recipe.schema import ModelEntry, SliceSource

__all__ = ["InputView", "RecipeView", "recipe_data", "view_recipe"]


@dataclass(frozen=True)
class InputView:
    """One model of a recipe.

    Attributes:
        name: As the recipe writes it.
        base: Whether it is the recipe's base model.
        what: Its architecture, or the type of an adapter; None if it cannot be opened.
        elements: Its parameters; None likewise.
        dtype: The type of most of its bytes; None likewise.
        problem: Why it cannot be opened.
        parameters: What the recipe sets for it, one mapping for each time that it is named.
    """

    name: str
    base: bool
    what: str | None
    elements: int | None
    dtype: str | None
    problem: str | None
    parameters: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class RecipeView:
    """What a recipe asks for.

    Attributes:
        name: Of the result.
        version: Of the result; None if it has none.
        method: Merge method.
        formula: Of the method.
        output: What is made: a model, an adapter, adapters.
        dtype: Type of the result; None: that of the inputs.
        parameters: What the recipe sets for the whole merge.
        inputs: Its models, the base first.
        slices: Number of slices of layers; None where whole models are merged.
    """

    name: str
    version: str | None
    method: str
    formula: str
    output: str
    dtype: str | None
    parameters: Mapping[str, Any]
    inputs: tuple[InputView, ...]
    slices: int | None


def view_recipe(recipe: Recipe, formula: str, home: Path) -> RecipeView:
    """Look at a checked recipe and at the headers of its models.

    Args:
        recipe: The recipe.
        formula: Of its merge method.
        home: Folder that relative paths start from.
    """
    settings: dict[str, list[Mapping[str, Any]]] = {}
    if recipe.base_model:
        settings[recipe.base_model] = []
    entries: list[ModelEntry | SliceSource] = [*(recipe.models or [])]
    entries += [source for part in recipe.slices or [] for source in part.sources]
    for entry in entries:
        held = settings.setdefault(entry.model, [])
        if entry.parameters:
            held.append(entry.parameters)
    return RecipeView(
        name=recipe.name or "",
        version=recipe.version,
        method=recipe.merge_method,
        formula=formula,
        output=recipe.output,
        dtype=recipe.out_dtype or recipe.dtype,
        parameters=recipe.parameters or {},
        inputs=tuple(
            _input(name, name == recipe.base_model, tuple(parameters), home)
            for name, parameters in settings.items()
        ),
        slices=len(recipe.slices) if recipe.slices else None,
    )


def recipe_data(view: RecipeView) -> dict[str, Any]:
    """A view as data for JSON; keys do not change."""
    return {"kind": "recipe", **asdict(view)}


def _input(
    name: str, base: bool, parameters: tuple[Mapping[str, Any], ...], home: Path
) -> InputView:
    try:
        source = look_at(name, home)
    except PackError as error:
        problem = error.message.splitlines()[0].removeprefix(f"{name}: ")
        return InputView(name, base, None, None, None, problem, parameters)
    try:
        if holds_adapter(source):
            adapter = view_adapter(source)
            what, elements, dtypes = adapter.adapter_type, adapter.parameters, adapter.dtypes
        else:
            model = view_model(source)
            what = model.architecture or "no config"
            elements, dtypes = model.parameters, model.dtypes
    except PackError as error:
        return InputView(name, base, None, None, None, error.message.splitlines()[0], parameters)
    finally:
        source.checkpoint.close()
    return InputView(name, base, what, elements, next(iter(dtypes), None), None, parameters)
