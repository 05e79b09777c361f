"""What a user sees while a merge runs: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import click

from mergekit_lite.merge.run import Progress
from mergekit_lite.text import human_bytes

__all__ = ["Lines", "TerminalBar", "make_progress"]

_EVERY = 5.0


class Lines(Progress):
    """A line at the beginning of each stage, and one every few seconds."""

    def __init__(self) -> None:
        self._title = ""
        self._total = 0
        self._done = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def begin(self, title: str, total: int) -> None:
        """A stage of so many bytes begins."""
        self._title, self._total, self._done = title, total, 0
        self._began = self._said = time.monotonic()
        size = f" {human_bytes(total)}" if total else ""
        click.echo(f"{title.lower()}{size}", err=True)

    def advance(self, count: int) -> None:
        """Bytes are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said >= _EVERY and self._total:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            click.echo(
                f"{self._title.lower()} {100 * self._done / self._total:.0f} %, "
                f"{human_bytes(rate)}/s, {left:.0f} s left",
                err=True,
            )

    def note(self, text: str) -> None:
        """Something that the user should know."""
        click.echo(f"note: {text}", err=True)


class TerminalBar(Progress):
    """A bar with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TaskID,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        self._waiting = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, title: str, total: int) -> None:
        """A stage of so many bytes begins."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=total or None)

    def advance(self, count: int) -> None:
        """Bytes are done; told to the bar a few megabytes at a time, since that costs."""
        with self._lock:
            self._waiting += count
            if self._waiting < 1 << 23:
                return
            count, self._waiting = self._waiting, 0
        if self._task is not None:
            self._bar.advance(self._task, count)

    def note(self, text: str) -> None:
        """Something that the user should know."""
        self._bar.console.print(f"note: {text}", markup=False, highlight=False)


class Silence(Lines):
    """Nothing at all."""

    def begin(self, title: str, total: int) -> None:
        """Say nothing."""

    def advance(self, count: int) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


def make_progress(quiet: bool) -> Lines | TerminalBar:
    """What fits where the messages go; to be entered as a context."""
    import sys

    if quiet:
        return Silence()
    return TerminalBar() if sys.stderr.isatty() else Lines()
