"""A comparison in words: the lines and tables that the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from mergekit_lite.analyse.diff import Diff, Group
from mergekit_lite.analyse.sums import Sums

__all__ = ["Table", "agreement", "cosine", "headline", "modules", "share", "short", "tensors"]


@dataclass(frozen=True)
class Table:
    """Titles and cells; the first column holds names, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def headline(diff: Diff) -> list[str]:
    """A line per model, and one on where they disagree."""
    several = len(diff.models) > 1
    lines = [
        f"{f'{i + 1}  {model}' if several else f'{model} against {diff.base}'}: "
        f"change {share(diff.sums.relative(i))} of the base, "
        f"cosine {cosine(diff.sums.cosine(i))}, {share(diff.sums.changed(i))} of the elements"
        for i, model in enumerate(diff.models)
    ]
    if several:
        lines.append(f"signs disagree in {share(diff.sums.conflict)} of what two or more changed")
    return lines


def agreement(diff: Diff) -> Table:
    """Cosines between the changes of all pairs of models."""
    models = range(len(diff.models))
    rows = [
        [f"{i + 1}  {diff.models[i]}", *(short(diff.sums.agreement(i, k)) for k in models)]
        for i in models
    ]
    return Table(["cosine of changes", *(str(k + 1) for k in models)], rows)


def modules(diff: Diff) -> Table:
    """A row per kind of module: mean and largest change over its layers, and more."""
    several = len(diff.models) > 1
    sizes = [f"Δ{i + 1}" for i in range(len(diff.models))] if several else ["mean"]
    last = ["conflict"] if several else ["cosine", "max |Δ|", "changed"]
    rows = [
        [
            diff.label(group),
            *_over_layers(group, len(diff.models)),
            *([share(group.sums.conflict)] if several else _one(group.sums)),
        ]
        for group in diff.groups
    ]
    return Table(["module", "layers", *sizes, "max", "at", *last], rows)


def tensors(diff: Diff, *, outside: bool = False) -> Table:
    """A row per tensor, or per tensor outside the layers."""
    models = range(len(diff.models))
    several = len(models) > 1
    wanted = [t for t in diff.tensors if t.layer is None or not outside]
    if not several:
        rows = [[t.name, share(t.sums.relative(0)), *_one(t.sums)] for t in wanted]
        return Table(["tensor", "change", "cosine", "max |Δ|", "changed"], rows)
    header = ["tensor", *(f"Δ{i + 1}" for i in models), *(f"cos {i + 1}" for i in models)]
    return Table(
        [*header, "conflict"],
        [
            [
                t.name,
                *(share(t.sums.relative(i)) for i in models),
                *(short(t.sums.cosine(i)) for i in models),
                share(t.sums.conflict),
            ]
            for t in wanted
        ],
    )


def share(value: float | None) -> str:
    """A share as percent, as a multiple where it is large, ``-`` where it is not defined."""
    if value is None:
        return "-"
    if value != value:
        return "NaN"
    if value >= 10:
        return "∞" if value == inf else f"{value:.3g}×"
    return f"{value:.2%}" if value >= 0.0001 or value == 0 else f"{value * 100:.0e}%"


def cosine(value: float | None) -> str:
    """A cosine that may be close to one."""
    return "-" if value is None else "NaN" if value != value else f"{value:.5f}"


def short(value: float | None) -> str:
    """A cosine where three digits do."""
    return "-" if value is None else "NaN" if value != value else f"{value:.3f}"


def _one(sums: Sums) -> list[str]:
    largest = sums.largest(0)
    return [cosine(sums.cosine(0)), f"{largest:.3g}".replace("nan", "NaN"), share(sums.changed(0))]


def _over_layers(group: Group, models: int) -> list[str]:
    """Layers; mean change of each model; the largest change of any, and in which layer."""
    if group.stack is None:
        return ["-", *(share(group.sums.relative(i)) for i in range(models)), "-", "-"]
    sizes = {at: [sums.relative(i) for i in range(models)] for at, sums in group.layers.items()}
    means = [share(sum(own[i] for own in sizes.values()) / len(sizes)) for i in range(models)]
    known = {at: [value for value in own if value == value] for at, own in sizes.items()}
    largest = {at: max(own) for at, own in known.items() if own}
    if not largest:
        return [str(len(sizes)), *means, "NaN", "-"]
    top = max(largest, key=lambda at: largest[at])
    return [str(len(sizes)), *means, share(largest[top]), str(top)]
