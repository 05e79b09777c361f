"""What a task does on whatever machine it runs; it knows nothing of the cluster that runs it.

Who works for the first time in a run opens the work again from its origin, headers only, and goes
on if plan and inputs are those of the process that asked; it keeps the work open for further tasks,
since a large plan takes seconds. In the end the process that asked sees whether the inputs are what
they were. A file of the result is written under a name that no other attempt
has, in a folder of this run beside the result, and then renamed into it: of two attempts either
may win, since their bytes are the same. So it is with what the steps before files make.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import mergekit_lite
from mergekit_lite.checkpoint.far.fetcher import FETCHER
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.checkpoint.protocol import InputFile
from mergekit_lite.engines.protocol import Origin, Portion, Step, Work
from mergekit_lite.errors import PackError
from mergekit_lite.merge.lock import environment
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.stream import Job, run_jobs
from mergekit_lite.merge.writer import ShardFile, explained
from mergekit_lite.methods.base import Statistic

__all__ = [
    "Asked", "Failed", "Written", "check", "digest", "do", "installed", "look", "settle",
    "versions", "write",
]  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What all tasks of a run have in common.

    Attributes:
        origin: What opens the work.
        fingerprints: Of its results, as the asking process found them.
        partials: Folders that the results are gathered in.
        attempts: Folders of this run in which files are written.
        folder: Current folder of the asking process, which relative paths may start from.
        versions: Of what computes there.
        memory: Bytes for weights in one task.
        rehash: Whether inputs are hashed again that were hashed before.
        cache: Bytes of what comes over a network that each machine keeps.
    """

    origin: Origin
    fingerprints: Sequence[str]
    partials: Sequence[Path]
    attempts: Sequence[Path]
    folder: Path
    versions: dict[str, str]
    memory: int
    rehash: bool
    cache: int = 0


@dataclass(frozen=True)
class Failed:
    """A `PackError` on its way."""

    message: str
    hint: str


@dataclass(frozen=True)
class Written:
    """A finished file: its digest, and what it holds of NaN and infinite elements, by tensor."""

    sha256: str
    nonfinite: dict[str, int]


def versions() -> dict[str, str]:
    """Versions of pack and of what computes the bytes."""
    return {"pack": mergekit_lite.__version__, **environment()}


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of packages, which are not imported for it; of one that is missing, ``missing``."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def look(asked: Asked) -> bool | Failed:
    """Find out whether tasks can run on this machine.

    Returns:
        Whether the inputs lie on disks of its own.
    """

    def run(work: Work) -> bool:
        for attempts in asked.attempts:
            if not attempts.is_dir():
                raise PackError(
                    f"{attempts.parent.parent}: this folder of the result is not that of the "
                    "machine where pack was started",
                    "Choose a folder that all nodes share: -o DIR",
                )
            with explained(attempts):
                probe = attempts / uuid.uuid4().hex
                probe.touch()
                probe.unlink()
        return all(not _is_remote(path) for path in work.paths)

    found = versions()
    found |= installed(name for name in asked.versions if name not in found)
    for name, version in asked.versions.items():
        if found.get(name) != version:
            return Failed(
                f"{name} is {found.get(name)} on a node, and {version} where pack was started",
                "Install the same versions of pack and its libraries on all nodes.",
            )
    return _opened(asked, run)


def settle(asked: Asked, threads: int) -> Statistic | Failed | None:
    """Show a statistic that spans the model all tensors."""

    def run(work: Work) -> Statistic | None:
        work.observe(_runner(work, asked, threads), Progress())
        return work.statistic

    return _opened(asked, run)


def do(asked: Asked, step: Step, statistic: Statistic | None, threads: int) -> Failed | None:
    """Do a step, or what is left of it."""

    def run(work: Work) -> None:
        if statistic is not None:
            work.statistic = statistic
        work.do([step], asked.attempts, threads, Progress())

    return _opened(asked, run)


def write(
    asked: Asked, result: int, name: str, statistic: Statistic | None, threads: int
) -> Written | Failed:
    """Compute one file."""

    def run(work: Work) -> Written:
        if statistic is not None:
            work.statistic = statistic
        shard = next(shard for shard in work.results[result] if shard.name == name)
        attempt = asked.attempts[result] / uuid.uuid4().hex
        final = asked.partials[result] / name
        with explained(attempt):
            file = ShardFile(shard, attempt)
            try:
                portion = Portion(result, frozenset(shard.header.entries), file)
                _runner(work, asked, threads, file.file.abort)(work.jobs([portion]))
                final.parent.mkdir(exist_ok=True)
                return Written(file.finish(final), file.nonfinite)
            finally:
                file.file.close()

    return _opened(asked, run)


def digest(asked: Asked, reference: str) -> list[InputFile] | Failed:
    """Hash the files of one input."""
    return _opened(asked, lambda work: work.input_files(reference), afresh=True)


def check(asked: Asked, statistic: Statistic | None) -> Any:
    """Look at what was written."""

    def run(work: Work) -> Any:
        if statistic is not None:
            work.statistic = statistic
        return work.check(asked.partials, Progress())

    return _opened(asked, run)


_held: dict[tuple[Path, ...], Work] = {}
"""The work of the run that this process has last worked for, by the folders of that run."""


def _opened(asked: Asked, run: Callable[[Work], T], *, afresh: bool = False) -> T | Failed:
    """Do something with the work.

    Args:
        asked: What all tasks of the run have in common.
        run: What to do.
        afresh: Whether it needs a work from which nothing was read before.
    """
    KNOWN.enabled = not asked.rehash
    FETCHER.cache_bytes = asked.cache
    with contextlib.suppress(OSError):  # paths may be absolute; what is missing is said by name
        os.chdir(asked.folder)
    key = tuple(asked.attempts)
    work = None if afresh else _held.pop(key, None)
    try:
        if work is None:
            if not afresh:
                _let_go()
            work = _open(asked)
        done = run(work)
        if not afresh:
            _held[key], work = work, None
        return done
    except PackError as error:
        return Failed(error.message, error.hint)
    finally:
        if work is not None:  # after a failure too nobody knows what was read
            work.close()


def _let_go() -> None:
    """Close what is held."""
    while _held:
        _held.popitem()[1].close()


def _open(asked: Asked) -> Work:
    """Open the work, and see that it is the same.

    Raises:
        PackError: It is not.
    """
    work = asked.origin.open()
    if list(work.fingerprints) != list(asked.fingerprints):
        work.close()
        raise PackError(
            "the inputs are not what they were when pack was started",
            "Wait until whatever writes them is done, and see that all nodes have the same "
            "files, times of change included; then run again.",
        )
    return work


def _runner(
    work: Work, asked: Asked, threads: int, abort: Callable[[], None] = lambda: None
) -> Callable[[Iterator[Job]], None]:
    held = work.held_bytes(asked.memory, threads)
    return lambda jobs: run_jobs(jobs, threads, held, lambda _: None, abort)


def _is_remote(path: Path) -> bool:
    """Whether a path lies on a disk of another machine, as far as the system tells."""
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8").splitlines()
    except OSError:
        return False
    where = path.resolve()
    best, kind = Path(), ""
    for line in lines:
        _, mount, name, *_ = line.split(" ")
        if where.is_relative_to(mount) and len(Path(mount).parts) >= len(best.parts):
            best, kind = Path(mount), name
    return kind.startswith(("nfs", "cifs", "smb", "fuse.", "9p", "ceph", "lustre", "gpfs", "beegfs",
                            "afs", "gluster"))  # fmt: skip
