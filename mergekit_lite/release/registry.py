"""Which version of a release is where: canary, staging, production; nothing is ever forgotten.

An SQLite file by itself. Stages are the latest of a list of events, so that going back is one event
more and the list tells all that was. Writers take turns (``BEGIN IMMEDIATE``).
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mergekit_lite.errors import PackError, nearest

__all__ = [
    "STAGES", "Event", "Registry", "SqliteRegistry", "Version", "check_promotion", "event_before",
    "open_registry",
]  # fmt: skip

STAGES = ("canary", "staging", "production")
_WAIT = 30.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
  name TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL, metrics TEXT NOT NULL,
  card TEXT NOT NULL, added TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
  PRIMARY KEY (name, version)
);
CREATE TABLE IF NOT EXISTS events (
  number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, stage TEXT NOT NULL,
  version TEXT, share REAL NOT NULL, reason TEXT NOT NULL,
  at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
  FOREIGN KEY (name, version) REFERENCES versions (name, version)
);
CREATE TRIGGER IF NOT EXISTS kept BEFORE DELETE ON events
  BEGIN SELECT RAISE(ABORT, 'history is kept'); END;
CREATE TRIGGER IF NOT EXISTS fixed BEFORE UPDATE ON events
  BEGIN SELECT RAISE(ABORT, 'history is kept'); END;
"""


@dataclass(frozen=True)
class Version:
    """A version that was added.

    Attributes:
        name: Of the release.
        version: Its version.
        digest: Of the release.
        metrics: What was measured, by name.
        added: When, in UTC.
    """

    name: str
    version: str
    digest: str
    metrics: Mapping[str, Any]
    added: str


@dataclass(frozen=True)
class Event:
    """What a stage became.

    Attributes:
        number: Its place in the history.
        stage: Of `STAGES`.
        version: That is there since; None where nothing is.
        share: Of the traffic, from 0 to 1.
        reason: ``promote`` or ``rollback``.
        at: When, in UTC.
    """

    number: int
    stage: str
    version: str | None
    share: float
    reason: str
    at: str


class Registry(Protocol):
    """What keeps book of versions and stages."""

    def add(
        self, name: str, version: str, digest: str, metrics: Mapping[str, Any], card: str
    ) -> bool:
        """Add a version; returns whether it is new."""

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of a name, in the order in which they were added."""

    def promote(self, name: str, version: str, stage: str, share: float = 1.0) -> Event:
        """Put a version into a stage."""

    def rollback(self, name: str, stage: str) -> Event:
        """Put back what was in a stage before."""

    def current(self, name: str) -> dict[str, Event]:
        """What is in each stage."""

    def history(self, name: str) -> list[Event]:
        """All that was, in order."""

    def close(self) -> None:
        """Let go of what is open."""


def open_registry(word: str, create: bool = False) -> Registry:
    """A registry by its file, or by ``mlflow://HOST:PORT``.

    Args:
        word: The file, or the address.
        create: Whether a file that is not there is made.

    Raises:
        PackError: It cannot be opened.
    """
    if word.startswith("mlflow:"):
        from mergekit_lite.release.mlflow import MlflowRegistry

        return MlflowRegistry(word)
    if "://" in word:
        raise PackError(
            f"{word}: no registry that pack knows", "Give a file, or mlflow://HOST:PORT"
        )
    if not create and not Path(word).is_file():
        raise PackError(f"{word}: there is no such registry", "Begin one: pack registry add FOLDER")
    return SqliteRegistry(Path(word))


class SqliteRegistry:
    """Versions and stages in a file.

    Args:
        path: Of the file; made if it is not there.

    Raises:
        PackError: It is no registry, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
            self._base.execute("PRAGMA foreign_keys = ON")
            self._base.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
        except (sqlite3.Error, OSError) as error:
            raise PackError(f"{path}: is no registry, or cannot be written ({error})") from None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One writer at a time; all of it or nothing."""
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    def add(
        self, name: str, version: str, digest: str, metrics: Mapping[str, Any], card: str
    ) -> bool:
        """Add a version; returns whether it is new.

        Raises:
            PackError: The version is there with another digest.
        """
        with self._turn():
            row = self._base.execute(
                "SELECT digest FROM versions WHERE name = ? AND version = ?", (name, version)
            ).fetchone()
            if row is not None and row[0] != digest:
                raise PackError(
                    f"{name} {version} is in the registry with another digest ({row[0]})",
                    "A version never changes; release it under the next one.",
                )
            if row is None:
                self._base.execute(
                    "INSERT INTO versions (name, version, digest, metrics, card)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (name, version, digest, json.dumps(metrics, sort_keys=True), card),
                )
        return row is None

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of a name, in the order in which they were added."""
        rows = self._base.execute(
            "SELECT name, version, digest, metrics, added FROM versions"
            " WHERE ?1 IS NULL OR name = ?1 ORDER BY rowid", (name,)
        )  # fmt: skip
        return [Version(n, v, d, json.loads(m), at) for n, v, d, m, at in rows]

    def promote(self, name: str, version: str, stage: str, share: float = 1.0) -> Event:
        """Put a version into a stage.

        Raises:
            PackError: There is no such version or stage.
        """
        check_promotion(name, version, stage, share, [v.version for v in self.versions(name)])
        now = self.current(name).get(stage)
        if now is not None and (now.version, now.share) == (version, share):
            return now
        return self._event(name, stage, version, share, "promote")

    def rollback(self, name: str, stage: str) -> Event:
        """Put back what was in a stage before.

        Raises:
            PackError: Nothing was there before.
        """
        with self._turn():
            kept = event_before(name, stage, self._history(name, stage))
            return self._insert(name, stage, kept.version, kept.share, "rollback")

    def current(self, name: str) -> dict[str, Event]:
        """What is in each stage."""
        found = {}
        for stage in STAGES:
            history = self._history(name, stage)
            if history:
                found[stage] = history[-1]
        return found

    def history(self, name: str) -> list[Event]:
        """All that was, in order."""
        return self._history(name, None)

    def _history(self, name: str, stage: str | None) -> list[Event]:
        rows = self._base.execute(
            "SELECT number, stage, version, share, reason, at FROM events"
            " WHERE name = ?1 AND (?2 IS NULL OR stage = ?2) ORDER BY number", (name, stage)
        )  # fmt: skip
        return [Event(*row) for row in rows]

    def _event(
        self, name: str, stage: str, version: str | None, share: float, reason: str
    ) -> Event:
        with self._turn():
            return self._insert(name, stage, version, share, reason)

    def _insert(
        self, name: str, stage: str, version: str | None, share: float, reason: str
    ) -> Event:
        self._base.execute(
            "INSERT INTO events (name, stage, version, share, reason) VALUES (?, ?, ?, ?, ?)",
            (name, stage, version, share, reason),
        )
        return self._history(name, stage)[-1]

    def close(self) -> None:
        """Close the file."""
        self._base.close()


def check_promotion(
    name: str, version: str, stage: str, share: float, known: Sequence[str]
) -> None:
    """Check what is asked.

    Raises:
        PackError: There is no such stage, version or share.
    """
    _check_stage(stage)
    if version not in known:
        raise PackError(
            f"{name} {version} is not in the registry{nearest(version, known)}",
            "Add it first: pack registry add FOLDER",
        )
    if not 0 < share <= 1:
        raise PackError(f"a share of {share:g} of the traffic is none", "Give 0 < share ≤ 1.")


def event_before(name: str, stage: str, history: Sequence[Event]) -> Event:
    """What was in a stage before what is there now, less what was taken back.

    Raises:
        PackError: Nothing was there before, or there is no such stage.
    """
    _check_stage(stage)
    stack: list[Event] = []
    for event in history:
        if event.reason == "promote":
            stack.append(event)
        elif stack:
            stack.pop()
    if len(stack) < 2:
        raise PackError(f"{name}: nothing was in {stage} before", "See: pack registry list")
    return stack[-2]


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise PackError(
            f"there is no stage '{stage}'{nearest(stage, STAGES)}", f"Stages: {', '.join(STAGES)}"
        )
