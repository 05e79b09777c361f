"""Tables in plain text: whole in a pipe, cut to the window on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence

import click

from mergekit_lite.text import plain

__all__ = ["echo_table", "table_lines", "window"]

_GAP = 2
_LEAST = 12


def window() -> int | None:
    """Columns of the terminal; None where the output goes into a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_lines(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    words: frozenset[int] = frozenset(),
) -> Iterator[str]:
    """Lay out a table: names and words to the left, numbers to the right.

    Args:
        header: Titles of the columns.
        rows: Cells; control characters in them are replaced.
        width: Columns there are; names in the first column lose their beginning, where they are
            most alike, until the table fits. None to lose nothing.
        words: Columns beside the first that hold words.
    """
    cells = [[plain(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    if width is not None:
        others = sum(widths[1:]) + _GAP * (len(widths) - 1)
        widths[0] = min(widths[0], max(_LEAST, width - others))
    for row in cells:
        parts = [_cut(row[0], widths[0]).ljust(widths[0])]
        parts += [
            row[i].ljust(widths[i]) if i in words else row[i].rjust(widths[i])
            for i in range(1, len(row))
        ]
        yield (" " * _GAP).join(parts).rstrip()


def echo_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], words: frozenset[int] = frozenset()
) -> None:
    """Print a table, its titles in bold on a terminal; see `table_lines`."""
    for number, line in enumerate(table_lines(header, rows, window(), words)):
        click.echo(line if number else click.style(line, bold=True))


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]
