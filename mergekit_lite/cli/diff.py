"""pack diff."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.cli.text import plain

if TYPE_CHECKING:
    from mergekit_lite.analyse.diff import Diff, Sums, TensorDiff

__all__ = ["command"]


@click.command("diff", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base")
@click.argument("models", nargs=-1, required=True)
@click.option("--tensors", is_flag=True, help="Show every tensor.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write a page with heat maps over layers and modules.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 1024), help="Worker threads.")
@click.option("--force", is_flag=True, help="Replace an existing page.")
@click.option("--json", "as_json", is_flag=True, help="Print all numbers for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    base: str,
    models: tuple[str, ...],
    tensors: bool,
    html: Path | None,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what MODELS changed in BASE, by layer and module.

    For every kind of module: the size of the change relative to the base, the cosine to the base,
    and, of several models, in which share of the elements that two or more changed their signs
    disagree. A model may be a base with adapters: base+adapter.
    """
    from mergekit_lite.adapters.locate import open_model
    from mergekit_lite.analyse.diff import compare_models
    from mergekit_lite.analyse.page import diff_page
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import default_threads
    from mergekit_lite.merge.writer import write_durably

    if html is not None and html.exists() and not force:
        raise PackError(f"{html}: already exists", "Replace it with --force.")
    opened: dict[str, Any] = {}
    names = [base, *models]
    try:
        every = [open_model(name, Path(), opened).checkpoint for name in names]
        with make_progress(quiet or as_json) as progress:
            found = compare_models(
                every[0], every[1:], names, threads or default_threads(), progress
            )
    finally:
        for source in opened.values():
            source.checkpoint.close()
    if html is not None:
        write_durably(html, diff_page(found).encode())
    if as_json:
        click.echo(json.dumps(_as_data(found)))
    elif not quiet:
        for line in _table(found, every=tensors):
            click.echo(line)
        if html is not None:
            click.echo(f"page → {html}")


def _table(found: Diff, *, every: bool) -> Iterator[str]:
    from mergekit_lite.analyse.diff import total

    several = len(found.models) > 1
    for i, model in enumerate(found.models):
        sums = total(found.tensors)
        head = f"{model} against {found.base}" if not several else f"{i + 1}  {model}"
        yield plain(
            f"{head}: change {_share(sums.relative(i))} of the base, cosine {sums.cosine(i):.5f}, "
            f"{_share(sums.changed(i))} of the elements"
        )
    if several:
        conflict = _share(total(found.tensors).conflict)
        yield f"signs disagree in {conflict} of what two or more changed"
    rows = list(_rows(found, every=every))
    width = min(max(len(name) for name, *_ in rows), 44)
    numbers = "".join(f"{f'change {i + 1}' if several else 'change':>9}" for i in
                      range(len(found.models)))  # fmt: skip
    last = "conflict" if several else "cosine"
    yield f"{'module':<{width}}  layers {numbers} {'largest at':>11} {last:>9}"
    for name, tensors, sums in rows:
        cells = "".join(f"{_share(sums.relative(i)):>9}" for i in range(len(found.models)))
        end = _share(sums.conflict) if several else f"{sums.cosine(0):.5f}"
        count = str(len(tensors)) if tensors[0].layer is not None else "-"
        yield plain(f"{name[:width]:<{width}}  {count:>6} {cells} {_largest(tensors):>11} {end:>9}")
    for name, why in list(found.others.items())[:5]:
        yield plain(f"left out: {name} {why}")
    if len(found.others) > 5:
        yield f"left out: … and {len(found.others) - 5} more"


def _rows(found: Diff, *, every: bool) -> Iterator[tuple[str, Sequence[TensorDiff], Sums]]:
    from mergekit_lite.analyse.diff import total

    if every:
        for tensor in found.tensors:
            yield tensor.name, [tensor], tensor.sums
        return
    for kind, tensors in found.kinds.items():
        yield kind, tensors, total(tensors)


def _largest(tensors: Sequence[TensorDiff]) -> str:
    """The layer in which the first model changed most."""
    if tensors[0].layer is None or len(tensors) < 2:
        return "-"
    top = max(tensors, key=lambda tensor: tensor.sums.relative(0))
    return f"layer {top.layer.index}" if top.layer is not None else "-"


def _share(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:.2%}" if value < 10 else f"{value:.1f}×"


def _as_data(found: Diff) -> dict[str, Any]:
    from mergekit_lite.analyse.diff import number, total

    def describe(sums: Sums) -> dict[str, Any]:
        models = range(len(found.models))
        data: dict[str, Any] = {
            "relative_change": [number(sums.relative(i)) for i in models],
            "cosine": [number(sums.cosine(i)) for i in models],
            "largest_change": [number(sums.largest(i)) for i in models],
            "changed_share": [number(sums.changed(i)) for i in models],
        }
        if len(found.models) > 1:
            data["sign_conflict"] = number(sums.conflict)
            data["change_cosine"] = [
                [number(sums.agreement(i, k)) if i != k else 1.0 for k in models] for i in models
            ]
        return data

    return {
        "base": found.base,
        "models": list(found.models),
        "total": describe(total(found.tensors)),
        "modules": {kind: describe(total(t)) for kind, t in found.kinds.items()},
        "tensors": {
            t.name: {
                "layer": t.layer.index if t.layer else None,
                "shape": list(t.shape),
                **describe(t.sums),
            }
            for t in found.tensors
        },
        "left_out": dict(found.others),
    }
