"""What an engine computes, and what it gives back; who plans and publishes knows no more of it.

A *work* is one result, or several that are made of the same weights, planned and with its inputs
open. It can be opened again from its *origin*, which is plain data, in another process or on
another machine; both are the same work if their fingerprints are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from mergekit_lite.checkpoint.protocol import InputFile
    from mergekit_lite.dtypes import Array
    from mergekit_lite.merge.plan import Shard
    from mergekit_lite.merge.run import Progress
    from mergekit_lite.merge.stream import Job
    from mergekit_lite.merge.writer import ArtifactWriter
    from mergekit_lite.methods.base import Statistic

__all__ = ["Computed", "Engine", "Origin", "Portion", "Sink", "Step", "Work"]


class Sink(Protocol):
    """What takes the bytes of tensors."""

    def write(self, name: str, offset: int, data: Array) -> None:
        """Take bytes of a tensor, ``offset`` from its start; from any thread."""

    def tensor_done(self, name: str, nonfinite: int) -> None:
        """All of a tensor has been written."""


@dataclass(frozen=True)
class Portion:
    """Some tensors of one result, and what takes their bytes.

    Attributes:
        result: Number of the result in its work.
        names: Of the tensors.
        sink: What takes them.
    """

    result: int
    names: frozenset[str]
    sink: Sink


class Origin(Protocol):
    """All it takes to open a work again, as plain data that can be pickled."""

    def open(self) -> Work:
        """Open the inputs and plan; reads headers and small files only."""


@dataclass(frozen=True)
class Step:
    """Something that is done before the files of a work are written.

    What it makes lies beside the result, for whoever writes these. One that is begun again goes on
    where it was, and of two processes that do the same one either may win.

    Attributes:
        number: That its work knows it by.
        name: For people.
        size: In bytes, as progress is counted.
    """

    number: int
    name: str
    size: int


class Work(ABC):
    """One result, or several of the same weights.

    Attributes:
        title: Of the stage in which it is computed.
        steps_title: Of the one before it, in which steps are done.
        origin: What opens it again.
        results: The files of each result.
        fingerprints: Of each result: equal where plan and inputs are.
        references: Of the inputs.
        paths: Where these lie on this machine.
        checked: Whether `check` looks at anything.
        step_threads: Threads of a process that does steps, where their bytes follow from it; None
            for any number.
        libraries: Packages whose versions the bytes follow from, beside those of every work.
    """

    title: str
    origin: Origin
    results: Sequence[Sequence[Shard]]
    fingerprints: Sequence[str]
    references: Sequence[str]
    paths: Sequence[Path]
    checked: bool = False
    steps_title: str = ""
    step_threads: int | None = None
    libraries: Sequence[str] = ()

    @property
    @abstractmethod
    def statistic(self) -> Statistic | None:
        """A statistic that spans the model; None where none is needed."""

    @statistic.setter
    @abstractmethod
    def statistic(self, settled: Statistic) -> None: ...

    @abstractmethod
    def observe(self, run: Callable[[Iterator[Job]], None], progress: Progress) -> None:
        """Show that statistic all tensors; before any job, unless a settled one was set."""

    def steps(self) -> Sequence[Step]:
        """What is left to do before files are written; in any order, at the same time too."""
        return ()

    def stepped(self) -> int:
        """Bytes of what steps have finished so far, by whomever."""
        return 0

    def do(
        self, steps: Sequence[Step], attempts: Sequence[Path], threads: int, progress: Progress
    ) -> None:
        """Do steps, one after the other; the statistic is settled before.

        Args:
            steps: Which.
            attempts: A folder of this run for each result, on its disk, for what is unfinished.
            threads: Worker threads.
            progress: Told how far it is.
        """

    def step_bytes(self, threads: int) -> int:
        """Upper estimate of the resident memory of a process that does a step."""
        return 0

    @abstractmethod
    def jobs(self, portions: Sequence[Portion]) -> Iterator[Job]:
        """The jobs that write some tensors, in the order in which files hold them."""

    @abstractmethod
    def job_bytes(self, portions: Sequence[Portion]) -> int:
        """What the progress of these jobs adds up to."""

    @abstractmethod
    def held_bytes(self, memory: int, threads: int) -> int:
        """What of a budget may be held between the passes of all tensors."""

    @abstractmethod
    def peak_bytes(self, memory: int, threads: int) -> int:
        """Upper estimate of the resident memory of a process that runs jobs."""

    @abstractmethod
    def input_files(self, reference: str) -> list[InputFile]:
        """The weight files of an input, hashed; to be called after the last read."""

    def check(self, folders: Sequence[Path], progress: Progress) -> Any:
        """Look at what was written, in one folder per result, before it gets its name."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Close the inputs."""


@dataclass(frozen=True)
class Computed:
    """What an engine gives back when every file is written.

    Attributes:
        weights: Hashed weight files by reference of an input.
        checked: What `Work.check` found.
        recomputed: Files and steps that were begun again, since whoever computed them was lost.
    """

    weights: Mapping[str, Sequence[InputFile]]
    checked: Any = None
    recomputed: int = 0


class Engine(ABC):
    """Computes works; a context, at whose end it lets go of what it holds."""

    @abstractmethod
    def compute(
        self,
        work: Work,
        writers: Sequence[ArtifactWriter],
        threads: int,
        memory: int,
        progress: Progress,
    ) -> Computed:
        """Write every file that a work's writers lack.

        Args:
            work: What to compute; the caller closes it.
            writers: One for each result; they keep each file that is finished.
            threads: Worker threads of one process.
            memory: Bytes for weights in one process.
            progress: Told how far it is.

        Raises:
            Interrupted: The user stopped it.
            PackError: The disk is full, a file changed or broke during the run.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None
