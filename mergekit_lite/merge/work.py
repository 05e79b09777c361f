"""A merge as the work of an engine: its jobs, and how it is opened again elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergekit_lite.checkpoint.announce import announce
from mergekit_lite.checkpoint.protocol import InputFile, Rows, TensorReader
from mergekit_lite.engines.protocol import Portion, Sink, Work
from mergekit_lite.kernels.cast import in_kernel
from mergekit_lite.kernels.fuse import count_nonfinite
from mergekit_lite.kernels.jit import TILE
from mergekit_lite.merge.buffers import BufferPool
from mergekit_lite.merge.checkpoint import MergeCheckpoint, MergeReader
from mergekit_lite.merge.plan import Plan, scratch_bytes
from mergekit_lite.merge.prepare import Prepared, prepare
from mergekit_lite.merge.stream import Job
from mergekit_lite.methods.base import Statistic
from mergekit_lite.recipe import Recipe

if TYPE_CHECKING:
    from mergekit_lite.merge.run import Progress

__all__ = ["FIXED", "INTERPRETER", "MergeOrigin", "MergeWork", "observing", "peak_memory"]

INTERPRETER = 250 * 10**6
"""Bytes of the interpreter and its libraries."""

FIXED = 64 * 10**6
"""Bytes of a budget that go into the buffers of files."""

_POOL = BufferPool()


@dataclass(frozen=True)
class MergeOrigin:
    """A merge as plain data.

    Attributes:
        recipe: What the user asked for.
        home: Folder that relative paths start from; absolute.
        shard_bytes: Most bytes of an output file.
    """

    recipe: Recipe
    home: Path
    shard_bytes: int

    def open(self) -> MergeWork:
        """Open the models and plan the merge."""
        return MergeWork(prepare(self.recipe, self.home, self.shard_bytes))


class MergeWork(Work):
    """A merge that is planned, its inputs open."""

    title = "Merge"

    def __init__(self, prepared: Prepared) -> None:
        self._plan, self._inputs = prepared.plan, prepared.inputs
        self._merged = MergeCheckpoint(self._plan, self._inputs)
        self.origin = MergeOrigin(self._plan.recipe, prepared.home.absolute(), prepared.shard_bytes)
        self.results = [self._plan.shards]
        self.fingerprints = [self._plan.fingerprint(self._inputs)]
        self._sources = self._inputs.sources
        self.references = list(self._sources)
        self.paths = [source.path for source in self._sources.values()]

    @property
    def statistic(self) -> Statistic | None:
        """A statistic that spans the model; None where none is needed."""
        return self._merged.spanning

    @statistic.setter
    def statistic(self, settled: Statistic) -> None:
        self._merged.spanning = settled

    def observe(self, run: Callable[[Iterator[Job]], None], progress: Progress) -> None:
        """Show that statistic all tensors."""
        observing(self._merged, run, progress)

    def jobs(self, portions: Sequence[Portion]) -> Iterator[Job]:
        """The jobs that write some tensors."""
        [portion] = portions
        names = [name for name in self._plan.tensors if name in portion.names]
        announce(self._merged.prefetch, names)
        for at, name in enumerate(names):
            for ahead in names[at + 1 : at + 3] if at else names[:3]:
                self._merged.prefetch(ahead)
            yield _WriteJob(name, self._merged.open(name), portion.sink)

    def job_bytes(self, portions: Sequence[Portion]) -> int:
        """Bytes of the tensors, as they are written."""
        return sum(self._plan.tensors[n].spec.nbytes for p in portions for n in p.names)

    def held_bytes(self, memory: int, threads: int) -> int:
        """What of a budget may be held between the passes of all tensors."""
        return max(0, memory - FIXED - scratch_bytes(self._plan, threads))

    def peak_bytes(self, memory: int, threads: int) -> int:
        """Upper estimate of the resident memory of a process that runs jobs."""
        return peak_memory(self._plan, memory, threads)

    def input_files(self, reference: str) -> list[InputFile]:
        """The weight files of an input, hashed."""
        checkpoint = self._sources[reference].checkpoint
        if hosts := checkpoint.elsewhere():
            from mergekit_lite.checkpoint.far.traffic import note_rate

            note_rate(hosts)
        return checkpoint.input_files()

    def close(self) -> None:
        """Close the inputs."""
        self._inputs.close()


class _WriteJob(Job):
    """Merges one tensor and writes it."""

    def __init__(self, name: str, reader: TensorReader, sink: Sink) -> None:
        super().__init__(reader)
        self._name = name
        self._sink = sink
        self._row_bytes = reader.spec.columns * reader.spec.dtype.itemsize
        self.nonfinite = 0

    def finish(self, rows: Rows) -> None:
        spec = self.reader.spec
        count = rows.size * spec.columns
        held = _POOL.take(count * spec.dtype.itemsize)
        out = held[: count * spec.dtype.itemsize].view(spec.dtype.storage)
        self.reader.read(rows, out)
        if in_kernel(spec.dtype):
            work = np.float64 if spec.dtype.name == "F64" else np.float32
            self.nonfinite += count_nonfinite(out, np.empty((1, TILE), work))
        elif spec.dtype.name == "F16":
            self.nonfinite += int(np.count_nonzero(~np.isfinite(out)))
        self._sink.write(self._name, rows.start * self._row_bytes, out)
        _POOL.give(held)

    def done(self) -> None:
        self._sink.tensor_done(self._name, self.nonfinite)


class _ObserveJob(Job):
    """Shows one tensor to the statistic that spans the model, in one of its passes."""

    def __init__(self, reader: MergeReader, index: int) -> None:
        super().__init__(reader)
        self._index = reader.inner_passes + index

    def finish(self, rows: Rows) -> None:
        self.reader.observe(self._index, rows)

    def done(self) -> None:
        pass


def observing(
    merged: MergeCheckpoint, run: Callable[[Iterator[Job]], None], progress: Progress
) -> None:
    """Show a statistic that spans the model all tensors, before the first of them is read.

    Args:
        merged: A merge; nothing happens if its method needs no such statistic.
        run: Runs jobs on all threads.
        progress: Told of each pass.
    """
    statistic = merged.spanning
    if statistic is None:
        return
    total = sum(merged.spec(name).nbytes for name in merged.names())
    index = 0
    while index < statistic.passes:
        progress.begin(f"Trim {index + 1}/{statistic.passes}", total)
        announce(merged.prefetch, merged.names())
        run(_observe_jobs(merged, index))
        statistic.settle(index)
        index += 1


def _observe_jobs(merged: MergeCheckpoint, index: int) -> Iterator[Job]:
    for name in merged.names():
        reader = merged.open_spanning(name)
        if reader is not None:
            yield _ObserveJob(reader, index)


def peak_memory(plan: Plan, memory: int, threads: int) -> int:
    """Upper estimate of the resident memory of a run, in bytes.

    The interpreter and its libraries, the budget or what the largest tensors need of it, and the
    chunk buffers of all threads.
    """
    largest = max(
        (t.spec.elements * len(t.sources) * plan.work.itemsize for t in plan.tensors.values()),
        default=0,
    )
    return INTERPRETER + min(memory, threads * largest + scratch_bytes(plan, threads))
