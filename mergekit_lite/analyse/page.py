"""A comparison as one self-contained HTML page: heat maps over layers and modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from mergekit_lite.analyse.diff import Diff, Sums, TensorDiff, total
from mergekit_lite.resources import resource_folder

__all__ = ["diff_page"]

_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129),
    (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
"""Nine steps of viridis (van der Walt and Smith, 2015), whose lightness rises evenly."""


@dataclass(frozen=True)
class _Cell:
    text: str
    colour: str
    ink: str


@dataclass(frozen=True)
class _Row:
    name: str
    cells: Sequence[_Cell | None]


@dataclass(frozen=True)
class _Map:
    title: str
    unit: str
    low: str
    high: str
    rows: Sequence[_Row]


@dataclass(frozen=True)
class _Line:
    """One line of the table of totals."""

    name: str
    cells: Sequence[str]


def diff_page(diff: Diff) -> str:
    """Render a comparison.

    Returns:
        HTML that loads nothing from elsewhere; names are escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("templates")),
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    stacks = _stacks(diff)
    maps = [
        [
            _map(tensors, f"Change of {model}", "of the base's norm",
                 _relative(i), zero=True)
            for i, model in enumerate(diff.models)
        ]
        + [
            _map(tensors, f"Cosine of {model} to the base", "", _cosine(i), zero=False)
            for i, model in enumerate(diff.models)
        ]
        + (
            [_map(tensors, "Signs that disagree",
                  "of the elements that two or more changed", lambda s: s.conflict, zero=True)]
            if len(diff.models) > 1
            else []
        )
        for tensors in stacks.values()
    ]  # fmt: skip
    layers = [1 + max(t.layer.index for t in tensors if t.layer) for tensors in stacks.values()]
    return environment.get_template("diff.html.jinja").render(
        base=diff.base,
        models=diff.models,
        stacks=[
            {"prefix": prefix, "layers": count, "maps": own}
            for (prefix, _), count, own in zip(stacks.items(), layers, maps, strict=True)
        ],
        totals=_totals(diff),
        agreement=_agreement(diff),
        outside=_outside(diff),
        left_out=sorted(diff.others.items()),
        scale=", ".join(f"rgb{colour}" for colour in _VIRIDIS),
    )


def _relative(model: int) -> Callable[[Sums], float]:
    return lambda sums: sums.relative(model)


def _cosine(model: int) -> Callable[[Sums], float]:
    return lambda sums: sums.cosine(model)


def _stacks(diff: Diff) -> dict[str, list[TensorDiff]]:
    found: dict[str, list[TensorDiff]] = {}
    for tensor in diff.tensors:
        if tensor.layer is not None:
            found.setdefault(tensor.layer.prefix, []).append(tensor)
    return found


def _map(
    tensors: Sequence[TensorDiff],
    title: str,
    unit: str,
    value: Callable[[Sums], float],
    *,
    zero: bool,
) -> _Map:
    """One heat map; its scale begins at zero or at the least value."""
    values = [v for t in tensors if isfinite(v := value(t.sums))]
    low = 0.0 if zero else min(values, default=0.0)
    high = max(values, default=1.0)
    count = 1 + max(t.layer.index for t in tensors if t.layer)
    rows: dict[str, list[_Cell | None]] = {}
    for tensor in tensors:
        if tensor.layer is None:
            continue
        cells = rows.setdefault(tensor.kind, [None] * count)
        found = value(tensor.sums)
        cells[tensor.layer.index] = _cell(found, low, high)
    return _Map(title, unit, _text(low), _text(high), [_Row(n, c) for n, c in rows.items()])


def _cell(value: float, low: float, high: float) -> _Cell:
    if not isfinite(value):
        return _Cell("NaN", "transparent", "inherit")
    at = (value - low) / (high - low) if high > low else 0.0
    at = min(1.0, max(0.0, at)) * (len(_VIRIDIS) - 1)
    step = min(int(at), len(_VIRIDIS) - 2)
    mixed = [
        round(a + (b - a) * (at - step))
        for a, b in zip(_VIRIDIS[step], _VIRIDIS[step + 1], strict=True)
    ]
    light = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] > 130
    red, green, blue = mixed
    return _Cell(_text(value), f"rgb({red},{green},{blue})", "#000" if light else "#fff")


def _text(value: float) -> str:
    if not isfinite(value):
        return "-"
    return f"{value:.4g}"


def _cosine_text(value: float) -> str:
    return f"{value:.5f}" if isfinite(value) else "-"


def _totals(diff: Diff) -> list[_Line]:
    """Kinds of modules with their sums over all layers."""
    lines = []
    for kind, tensors in [("all tensors", list(diff.tensors)), *diff.kinds.items()]:
        sums = total(tensors)
        cells = [str(len(tensors))]
        for i in range(len(diff.models)):
            cells += [_text(sums.relative(i)), _cosine_text(sums.cosine(i))]
        if len(diff.models) > 1:
            cells.append(_text(sums.conflict))
        lines.append(_Line(kind, cells))
    return lines


def _agreement(diff: Diff) -> list[_Row]:
    """Cosines between the changes of the models, a square matrix; empty for one model."""
    models = range(len(diff.models))
    if len(models) < 2:
        return []
    sums = total(diff.tensors)
    return [
        _Row(
            diff.models[i],
            [_cell(1.0 if i == k else sums.agreement(i, k), -1.0, 1.0) for k in models],
        )
        for i in models
    ]


def _outside(diff: Diff) -> list[_Line]:
    """Tensors outside the layers."""
    return [
        _Line(
            tensor.name,
            [
                text
                for i in range(len(diff.models))
                for text in (_text(tensor.sums.relative(i)), _cosine_text(tensor.sums.cosine(i)))
            ],
        )
        for tensor in diff.tensors
        if tensor.layer is None
    ]
