"""Parameters of merge methods: what they may be, and what they resolve to for a tensor.

A setting is a scalar, a gradient (a list of numbers, interpolated over the layers), or a list of
``{filter, value}`` of which the first whose filter is part of the tensor's name holds. This is
mergekit's language; see https://github.com/arcee-ai/mergekit#parameter-specification.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Between", "Parameter", "Setting", "Value", "first_set", "parse_setting"]

Value = float | bool | str
"""A resolved parameter."""

IGNORED = {"int8_mask": "pack never holds masks, so it has nothing to shrink"}
"""Parameters of mergekit that change nothing here, and why."""


@dataclass(frozen=True)
class Between:
    """The values that a number may take, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, read off its signature.

    Attributes:
        name: As in a recipe.
        argument: As in the signature; differs where the name is a Python keyword.
        kind: ``float``, ``bool`` or ``choice``.
        default: None where a recipe must give it.
        each: Whether every model has its own value.
        choices: Words that are allowed, for ``choice`` and beside the booleans of ``bool``.
        bounds: Range of a number, or None.
        summary: One sentence.
    """

    name: str
    argument: str
    kind: Literal["float", "bool", "choice"]
    default: Value | None
    each: bool
    choices: tuple[str, ...] = ()
    bounds: Between | None = None
    summary: str = ""


@dataclass(frozen=True)
class Setting:
    """What a recipe says of one parameter in one place.

    Attributes:
        branches: Filter (None for all tensors) and value; a tuple of numbers is a gradient.
    """

    branches: tuple[tuple[str | None, Value | tuple[float, ...]], ...]

    def at(self, name: str, position: float) -> Value | None:
        """The value for a tensor.

        Args:
            name: Of the tensor.
            position: Between the first layer (0.0) and the last one (1.0).

        Returns:
            None where no filter is part of the name.
        """
        for part, value in self.branches:
            if part is None or part == "*" or part in name:
                return _interpolate(value, position) if isinstance(value, tuple) else value
        return None


def _interpolate(anchors: Sequence[float], position: float) -> float:
    scaled = position * (len(anchors) - 1)
    low = min(int(scaled), len(anchors) - 1)
    high = min(low + 1, len(anchors) - 1)
    return anchors[low] + (anchors[high] - anchors[low]) * (scaled - low)


def first_set(
    settings: Iterable[Mapping[str, Setting]], name: str, tensor: str, at: float
) -> Value | None:
    """The value of a parameter from the first of several levels that says something of a tensor."""
    for level in settings:
        setting = level.get(name)
        value = setting.at(tensor, at) if setting else None
        if value is not None:
            return value
    return None


def parse_setting(
    raw: Any, parameter: Parameter
) -> tuple[Setting | None, list[tuple[tuple[str | int, ...], str]]]:
    """Read a setting from a recipe's data.

    Returns:
        The setting, and the mistakes in it with paths relative to it; one of the two is empty.
    """
    mistakes: list[tuple[tuple[str | int, ...], str]] = []
    branches: list[tuple[str | None, Value | tuple[float, ...]]] = []
    if isinstance(raw, list) and raw and all(isinstance(item, dict) for item in raw):
        for i, item in enumerate(raw):
            unknown = sorted(item.keys() - {"filter", "value"})
            if unknown or "value" not in item:
                what = f"unknown key '{unknown[0]}'" if unknown else "has no 'value'"
                mistakes.append(((i,), f"{what}; an entry is a mapping of 'filter' and 'value'"))
                continue
            part = item.get("filter")
            if part is not None and not isinstance(part, str):
                mistakes.append(((i, "filter"), "a filter is part of a tensor's name"))
                continue
            value, problem = _parse_value(item["value"], parameter)
            if problem:
                mistakes.append(((i, "value"), problem))
            else:
                branches.append((part, value))
    else:
        value, problem = _parse_value(raw, parameter)
        if problem:
            mistakes.append(((), problem))
        else:
            branches.append((None, value))
    return (None if mistakes else Setting(tuple(branches))), mistakes


def _parse_value(raw: Any, parameter: Parameter) -> tuple[Value | tuple[float, ...], str]:
    if isinstance(raw, list):
        if parameter.kind != "float":
            return 0.0, f"'{parameter.name}' takes no list; {_expected(parameter)}"
        if not raw:
            return 0.0, "a gradient needs at least one number"
        numbers = []
        for item in raw:
            value, problem = _parse_scalar(item, parameter)
            if problem:
                return 0.0, problem
            numbers.append(float(value))
        return tuple(numbers), ""
    return _parse_scalar(raw, parameter)


def _parse_scalar(raw: Any, parameter: Parameter) -> tuple[Value, str]:
    problem = f"{raw!r:.60} does not fit '{parameter.name}'; {_expected(parameter)}"
    if parameter.kind == "float":
        if isinstance(raw, str) and re.fullmatch(r"\s*[-+]?[\d.]+(e[-+]?\d+)?\s*", raw.lower()):
            return 0.0, f"{raw!r:.60} is text; remove the quotes"
        if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
            return 0.0, problem
        bounds = parameter.bounds
        if bounds and not bounds.low <= raw <= bounds.high:
            return 0.0, problem
        return float(raw), ""
    if parameter.kind == "bool" and (isinstance(raw, bool) or raw in (0, 1)):
        return bool(raw), ""
    if isinstance(raw, str) and raw in parameter.choices:
        return raw, ""
    return 0.0, problem


def _expected(parameter: Parameter) -> str:
    if parameter.kind == "float":
        bounds = parameter.bounds
        return (
            f"expected a number from {bounds.low:g} to {bounds.high:g}"
            if bounds
            else "expected a number"
        )
    words = (["true", "false"] if parameter.kind == "bool" else []) + list(parameter.choices)
    return "expected " + (
        " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
    )
