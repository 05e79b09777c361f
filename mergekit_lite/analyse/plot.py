"""A comparison as a picture: how much each layer changed, and where signs disagree (SVG 1.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mergekit_lite.analyse.diff import Diff, TensorDiff
from mergekit_lite.analyse.sums import Sums
from mergekit_lite.resources import resource_folder

__all__ = ["LayerDelta", "by_layer", "layer_plot"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by people who see few colours (Okabe and Ito, 2008), the easiest first."""
_DASHES = ("none", "6 3", "2 3")
_WIDTH, _LEFT, _RIGHT, _TOP, _HIGH, _GAP, _LINE = 720, 64, 24, 36, 150, 54, 18


@dataclass(frozen=True)
class LayerDelta:
    """A layer of the largest stack.

    Attributes:
        index: Of the layer.
        change: Norm of each model's change relative to the base's norm.
        conflict: Of the elements that two or more changed, the share in which signs differ; None
            where there are none.
    """

    index: int
    change: tuple[float, ...]
    conflict: float | None


def by_layer(diff: Diff) -> list[LayerDelta]:
    """The layers of the stack that has most tensors, to four digits; empty without layers."""
    counts = Counter(t.layer.prefix for t in diff.tensors if t.layer is not None)
    if not counts:
        return []
    prefix = max(counts, key=lambda name: (counts[name], name))
    found: dict[int, list[TensorDiff]] = {}
    for tensor in diff.tensors:
        if tensor.layer is not None and tensor.layer.prefix == prefix:
            found.setdefault(tensor.layer.index, []).append(tensor)
    models = range(len(diff.models))
    layers = []
    for index in sorted(found):
        sums = Sums.over(len(models), [tensor.sums for tensor in found[index]])
        conflict = None if sums.conflict is None else _rounded(sums.conflict)
        change = tuple(_rounded(sums.relative(model)) for model in models)
        layers.append(LayerDelta(index, change, conflict))
    return layers


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def layer_plot(layers: Sequence[LayerDelta], models: Sequence[str]) -> str:
    """Draw the layers.

    Args:
        layers: One or more.
        models: Names of the models.
    """
    import jinja2

    conflicts = {la.index: la.conflict for la in layers if la.conflict is not None}
    panels = [_lines(layers, len(models)), *([_bars(layers, conflicts)] if conflicts else [])]
    start = _TOP + len(panels) * (_HIGH + _GAP)
    legend = [
        {"y": start + _LINE * at, "name": name if len(name) <= 90 else f"…{name[-89:]}", **_ink(at)}
        for at, name in enumerate(models)
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    text = (resource_folder("templates") / "deltas.svg.jinja").read_text("utf-8")
    return environment.from_string(text).render(
        width=_WIDTH, height=start + _LINE * len(models) + 8, left=_LEFT, right=_WIDTH - _RIGHT,
        panels=panels, legend=legend,
    )  # fmt: skip


def _ink(model: int) -> dict[str, str]:
    """What a model is drawn with."""
    return {"colour": _COLOURS[model % len(_COLOURS)],
            "dash": _DASHES[model // len(_COLOURS) % len(_DASHES)]}  # fmt: skip


def _lines(layers: Sequence[LayerDelta], models: int) -> dict[str, Any]:
    """A line for each model: its change over the layers."""
    top = _ceiling([value for layer in layers for value in layer.change])
    lines = [
        {
            "points": [
                (_x(at, len(layers)), _y(layer.change[model], top, _TOP))
                for at, layer in enumerate(layers) if isfinite(layer.change[model])
            ],
            "dots": len(layers) <= 64,
            **_ink(model),
        }
        for model in range(models)
    ]  # fmt: skip
    title = "change of the layer, relative to the base"
    return {**_axes(title, _TOP, top, layers), "lines": lines, "bars": []}


def _bars(layers: Sequence[LayerDelta], conflicts: Mapping[int, float]) -> dict[str, Any]:
    """A bar for each layer: where the signs of the changes disagree."""
    start = _TOP + _HIGH + _GAP
    top = _ceiling(list(conflicts.values()))
    wide = round(max(1.0, min(28.0, 0.7 * (_WIDTH - _LEFT - _RIGHT) / len(layers))), 1)
    bars = []
    for at, layer in enumerate(layers):
        value = conflicts.get(layer.index)
        if value is not None and isfinite(value):
            x, y = _x(at, len(layers)), _y(value, top, start)
            bars.append({"x": round(x - wide / 2, 1), "y": y, "width": wide,
                         "height": round(start + _HIGH - y, 1)})  # fmt: skip
    title = "signs that disagree, of what two or more changed"
    return {**_axes(title, start, top, layers), "lines": [], "bars": bars}


def _axes(title: str, start: int, top: float, layers: Sequence[LayerDelta]) -> dict[str, Any]:
    every = -(-len(layers) // 16)
    return {
        "title": title,
        "title_y": start - 12,
        "bottom": start + _HIGH,
        "ticks": [
            {"y": _y(top * step / 4, top, start), "text": f"{top * step * 25:.3g}%"}
            for step in range(5)
        ],
        "labels": [
            {"x": _x(at, len(layers)), "text": str(layers[at].index)}
            for at in range(0, len(layers), every)
        ],
    }  # fmt: skip


def _ceiling(values: Sequence[float]) -> float:
    """A round number, no smaller than any value."""
    largest = max((value for value in values if isfinite(value)), default=0.0)
    if largest <= 0:
        return 0.01
    unit = 10.0 ** (len(f"{largest:.0f}") - 1) if largest >= 1 else 1.0
    while unit > largest:
        unit /= 10
    return next(unit * factor for factor in (1, 2, 4, 5, 8, 10) if unit * factor >= largest)


def _x(at: int, count: int) -> float:
    wide = _WIDTH - _LEFT - _RIGHT
    return round(_LEFT + wide * (at + 0.5) / count, 1)


def _y(value: float, top: float, start: int) -> float:
    return round(start + _HIGH * (1 - value / top), 1)
