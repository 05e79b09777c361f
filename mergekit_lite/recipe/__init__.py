"""What a user writes: a recipe's schema, its mistakes, and the values its parameters resolve to."""

from __future__ import annotations

from mergekit_lite.recipe.parameters import Between, Parameter, Setting, Value
from mergekit_lite.recipe.read import parse_recipe, read_recipe
from mergekit_lite.recipe.schema import (
    EvaluateSection,
    MethodSchema,
    ModelEntry,
    Recipe,
    Slice,
    SliceSource,
    changed,
)

__all__ = [
    "Between",
    "EvaluateSection",
    "MethodSchema",
    "ModelEntry",
    "Parameter",
    "Recipe",
    "Setting",
    "Slice",
    "SliceSource",
    "Value",
    "changed",
    "parse_recipe",
    "read_recipe",
]
