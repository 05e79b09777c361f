"""A comparison as one self-contained HTML page: heat maps over layers and modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from mergekit_lite.analyse.colour import VIRIDIS, colour_at, is_light
from mergekit_lite.analyse.diff import Diff, Group
from mergekit_lite.analyse.summary import agreement, headline, modules, share, short, tensors
from mergekit_lite.analyse.sums import Sums
from mergekit_lite.errors import PackError
from mergekit_lite.resources import resource_folder
from mergekit_lite.text import plain

__all__ = ["check_page", "diff_page"]

_MARK = '<meta name="generator" content="pack diff">'
_FEW, _MANY = 12, 40
_SHOWN = 200

Measure = Callable[[Sums], float | None]


@dataclass(frozen=True)
class _Cell:
    """One layer of one module; its kind is ``dark``, ``light``, ``nan`` or ``none``."""

    kind: str
    colour: str
    text: str
    exact: str


@dataclass(frozen=True)
class _Map:
    """One heat map: rows of cells by name; None where a layer has no such module."""

    title: str
    rows: Mapping[str, Sequence[_Cell | None]]


@dataclass(frozen=True)
class _Section:
    """Maps of one measure on one scale, so that they can be compared with each other."""

    title: str
    about: str
    low: str
    high: str
    maps: Sequence[_Map]
    folded: bool

    @property
    def marks(self) -> set[str]:
        """Kinds of cells that there are, for the legend."""
        rows = [row for each in self.maps for row in each.rows.values()]
        return {cell.kind for row in rows for cell in row if cell}


@dataclass(frozen=True)
class _Kind:
    """One measure of a stack's groups, by what each map is called."""

    title: str
    about: str
    measures: Mapping[str, Measure]
    write: Callable[[float | None], str]
    from_zero: bool = True
    folded: bool = False


def check_page(path: Path, force: bool) -> None:
    """Refuse a place where the page cannot be written, before any weight is read.

    Raises:
        PackError: Something is there that is no page of ours, or is one and ``force`` was not
            given; or no folder can be made there.
    """
    if os.path.lexists(path):
        if not force:
            raise PackError(f"{path}: already exists", "Replace it with --force.")
        with path.open("rb") as file:
            if _MARK.encode() not in file.read(4096):
                raise PackError(
                    f"{path}: is not a page of pack diff, and --force replaces only those",
                    "Give another name, or remove the file yourself.",
                )
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PackError(f"{folder}: no file can be written there", "Give another name to --html.")


def diff_page(diff: Diff) -> str:
    """Render a comparison.

    Returns:
        HTML that loads nothing from elsewhere; names are escaped and without control characters.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("templates")),
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )  # fmt: skip
    several = len(diff.models) > 1
    outside = tensors(diff, outside=True)
    return environment.get_template("diff.html.jinja").render(
        title=f"{', '.join(diff.models)} against {diff.base}",
        base=diff.base,
        models=diff.models,
        lines=headline(diff),
        notes=[*diff.notes, *_warnings(diff)],
        modules=modules(diff),
        agreement=agreement(diff) if several else None,
        outside=outside if outside.rows else None,
        stacks=[_stack(diff, prefix) for prefix in diff.stacks],
        left_out=list(diff.others.items())[:_SHOWN],
        left_out_more=max(0, len(diff.others) - _SHOWN),
        scale=", ".join(f"rgb({r},{g},{b})" for r, g, b in VIRIDIS),
    )


def _warnings(diff: Diff) -> list[str]:
    broken = diff.not_finite()
    return [
        f"'{name}' of {label} holds {count} elements that are NaN or infinite"
        for label, name, count in broken[:20]
    ] + ([f"… and {len(broken) - 20} more tensors"] if len(broken) > 20 else [])


def _stack(diff: Diff, prefix: str) -> dict[str, object]:
    groups = [group for group in diff.groups if group.stack == prefix]
    layers = 1 + max(index for group in groups for index in group.layers)
    size = "few" if layers <= _FEW else "many" if layers > _MANY else "some"
    sections = [_section(kind, groups, layers) for kind in _kinds(diff)]
    return {"prefix": prefix, "layers": layers, "size": size, "sections": sections}


def _kinds(diff: Diff) -> Iterator[_Kind]:
    """What is shown of every stack."""
    models = range(len(diff.models))
    names = [f"{i + 1}  {diff.models[i]}" if models[1:] else diff.models[i] for i in models]

    def each(measure: Callable[[Sums, int], float | None]) -> dict[str, Measure]:
        return {names[i]: _of(measure, i) for i in models}

    yield _Kind("Change", "norm of what changed, relative to the norm of the base",
                each(Sums.relative), share)  # fmt: skip
    if models[1:]:
        yield _Kind("Signs that disagree", "share of the elements that two or more models changed",
                    {"all models": lambda sums: sums.conflict}, share)  # fmt: skip
        pairs = [(i, k) for i in models for k in models if i < k]
        yield _Kind(
            "Cosine between changes", "1: the same direction, 0: unrelated, −1: opposite",
            {f"{names[i]}  and  {names[k]}": _between(i, k) for i, k in pairs}, short,
            folded=len(pairs) > 3,
        )  # fmt: skip
    yield _Kind("Cosine to the base", "1: only the length changed, if anything",
                each(Sums.cosine), lambda v: short(v) if v is None or v < 0.9995 else f"{v:.5f}",
                from_zero=False, folded=len(models) > 1)  # fmt: skip
    yield _Kind("Elements that changed", "share of all", each(Sums.changed), share, folded=True)


def _of(measure: Callable[[Sums, int], float | None], model: int) -> Measure:
    return lambda sums: measure(sums, model)


def _between(first: int, second: int) -> Measure:
    return lambda sums: sums.agreement(first, second)


def _section(kind: _Kind, groups: Sequence[Group], layers: int) -> _Section:
    """Compute all maps of a measure, and lay one scale over them."""
    found = {
        title: {
            group.kind: {index: measure(sums) for index, sums in group.layers.items()}
            for group in groups
        }
        for title, measure in kind.measures.items()
    }
    values = [
        value
        for rows in found.values()
        for cells in rows.values()
        for value in cells.values()
        if value is not None and isfinite(value)
    ]
    low = min([0.0, *values]) if kind.from_zero else min(values, default=0.0)
    high = max([low, *values])
    maps = [
        _Map(
            title,
            {
                name: [
                    _cell(cells[i], low, high, kind.write) if i in cells else None
                    for i in range(layers)
                ]
                for name, cells in rows.items()
            },
        )
        for title, rows in found.items()
    ]
    return _Section(kind.title, kind.about, kind.write(low), kind.write(high), maps, kind.folded)


def _cell(
    value: float | None, low: float, high: float, write: Callable[[float | None], str]
) -> _Cell:
    if value is None:
        return _Cell("none", "", "", "not defined")
    if not isfinite(value):
        return _Cell("nan", "", write(value), "NaN" if value != value else "infinite")
    colour = colour_at((value - low) / (high - low) if high > low else 0.0)
    kind = "light" if is_light(colour) else "dark"
    return _Cell(kind, "#{:02x}{:02x}{:02x}".format(*colour), write(value), f"{value:.7g}")
