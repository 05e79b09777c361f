"""pack diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.table import echo_table
from mergekit_lite.text import plain

if TYPE_CHECKING:
    from mergekit_lite.analyse.diff import Diff
    from mergekit_lite.checkpoint.locate import Source
    from mergekit_lite.checkpoint.protocol import Checkpoint

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
@click.option("--force", is_flag=True, help="Replace an existing page of pack diff.")
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

    For every kind of module: the size of the change relative to the base (mean and largest over
    the layers), the cosine to the base, the largest change of an element and the share of elements
    that changed. Of several models: how alike their changes are, and in which share of the
    elements that two or more changed their signs disagree.

    A model may be a base with adapters, base+adapter, or a GGUF file: what quantizing changed. Of
    two releases: what changed in recipe, parents, files and what was measured.
    """
    if len(models) == 1 and _releases(Path(base), Path(models[0]), as_json, quiet):
        return
    from mergekit_lite.analyse.data import diff_data
    from mergekit_lite.analyse.diff import compare_models
    from mergekit_lite.analyse.page import check_page, diff_page
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.merge.run import default_threads
    from mergekit_lite.merge.writer import write_durably

    if html is not None:
        check_page(html, force)
    opened: dict[str, Source] = {}
    names = [base, *models]
    try:
        every = [_open(name, opened) for name in names]
        with make_progress(quiet or as_json) as progress:
            first, *others = _comparable([source.checkpoint for source in every])
            found = compare_models(first, others, names, threads or default_threads(), progress)
    finally:
        for source in opened.values():
            source.checkpoint.close()
    if html is not None:
        write_durably(html, diff_page(found).encode())
    if as_json:
        click.echo(json.dumps(diff_data(found)))
    elif not quiet:
        _show(found, every=tensors)
        for note in [*found.notes, *dict.fromkeys(n for s in every for n in s.notes)]:
            click.echo(plain(f"note: {note}"))
        if html is not None:
            click.echo(plain(f"page → {html}"))
    _warn(found)


def _releases(before: Path, after: Path, as_json: bool, quiet: bool) -> bool:
    """Compare two releases, if that is what they are."""
    from mergekit_lite.release.compare import compare_releases, is_release

    if not (is_release(before) and is_release(after)):
        return False
    found = compare_releases(before, after)
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        click.echo(plain(" → ".join(found.pop("releases"))))
        for title, lines in found.items():
            click.echo(f"{title}: {'nothing changed' if not lines else ''}")
            for line in lines:
                click.echo(plain(f"  {line}"))
    return True


def _open(name: str, opened: dict[str, Source]) -> Source:
    from mergekit_lite.adapters.locate import open_model

    return open_model(name, Path(), opened)


def _comparable(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    if all(type(checkpoint).__name__ != "GgufCheckpoint" for checkpoint in checkpoints):
        return checkpoints
    from exporters.gguf.compare import comparable

    return comparable(checkpoints)


def _show(found: Diff, *, every: bool) -> None:
    from mergekit_lite.analyse.summary import agreement, headline, modules, tensors

    for line in headline(found):
        click.echo(plain(line))
    tables = [agreement(found)] if len(found.models) > 1 else []
    for table in [*tables, tensors(found) if every else modules(found)]:
        click.echo()
        echo_table(table.header, table.rows)
    for name, why in list(found.others.items())[:5]:
        click.echo(plain(f"left out: {name} {why}"))
    if len(found.others) > 5:
        click.echo(f"left out: … and {len(found.others) - 5} more (all of them with --json)")


def _warn(found: Diff) -> None:
    broken = found.not_finite()
    if broken:
        label, name, count = broken[0]
        click.secho(
            plain(
                f"warning: {len(broken)} tensor(s) hold NaN or infinity, first '{name}' of {label} "
                f"({count} elements)"
            ),
            fg="yellow", err=True,
        )  # fmt: skip
