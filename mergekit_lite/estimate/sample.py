"""A merge of random models that costs what a real one of the same kind does.

The models lie in memory, as files do in the page cache; the result is written, hashed and deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mergekit_lite.checkpoint.layers import LayerMap
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.estimate.kinds import Kind, Kinds
from mergekit_lite.kernels.cast import encode, in_kernel
from mergekit_lite.kernels.fuse import count_nonfinite
from mergekit_lite.kernels.jit import TILE
from mergekit_lite.merge.checkpoint import MergeCheckpoint, MergeReader
from mergekit_lite.merge.inputs import Inputs, Model
from mergekit_lite.merge.plan import PlannedTensor
from mergekit_lite.merge.segments import SegmentedFile
from mergekit_lite.merge.stream import Job, run_jobs

__all__ = ["Clock", "Sample", "Spent", "median"]

_SAMPLE_BYTES = 256 * 10**6
_TENSOR_ELEMENTS = 8 << 20
_REPETITIONS = 3


class Spent(NamedTuple):
    """Seconds by the clock, and of processors."""

    clock: float
    busy: float


class Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> Spent:
        spent = os.times()
        children = spent.children_user + spent.children_system
        return Spent(time.perf_counter(), time.process_time() + children)

    def read(self) -> Spent:
        """What was spent since, programs included that this one started and that have ended."""
        now = self._now()
        return Spent(now.clock - self._began.clock, max(1e-9, now.busy - self._began.busy))


def median(spent: Sequence[Spent]) -> Spent:
    """Median of each of the two."""
    return Spent(
        statistics.median(s.clock for s in spent), statistics.median(s.busy for s in spent)
    )


@dataclass(frozen=True)
class _Place:
    start: int
    spec: TensorSpec


class _MemoryReader(TensorReader):
    def __init__(self, fd: int, place: _Place) -> None:
        self.spec = place.spec
        self._fd = fd
        self._start = place.start
        self._row_bytes = place.spec.columns * place.spec.dtype.itemsize

    def read(self, rows: Rows, out: Array) -> None:
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            at = self._start + rows.start * self._row_bytes + done
            done += os.preadv(self._fd, [view[done:]], at)


class _MemoryCheckpoint(Checkpoint):
    """A model in a file that only this process has."""

    def __init__(self, places: Mapping[str, _Place], content: Sequence[Array]) -> None:
        self.label = "sample"
        self.folder = None
        self.config = {}
        self._places = places
        self._fd = _nameless()
        for array in content:
            view = array.view(np.uint8).data
            done = 0
            while done < len(view):
                done += os.write(self._fd, view[done:])

    def names(self) -> Sequence[str]:
        return sorted(self._places)

    def spec(self, name: str) -> TensorSpec:
        return self._places[name].spec

    def open(self, name: str) -> TensorReader:
        return _MemoryReader(self._fd, self._places[name])

    def close(self) -> None:
        os.close(self._fd)


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pack-sample", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _SampleJob(Job):
    """Merges one tensor as a run does."""

    def __init__(self, reader: TensorReader, file: SegmentedFile | None, start: int) -> None:
        super().__init__(reader)
        self._file = file
        self._start = start

    def finish(self, rows: Rows) -> None:
        spec = self.reader.spec
        count = rows.size * spec.columns
        out = _buffer(count * spec.dtype.itemsize).view(spec.dtype.storage)
        self.reader.read(rows, out)
        if in_kernel(spec.dtype):
            work = np.float64 if spec.dtype.name == "F64" else np.float32
            count_nonfinite(out, np.empty((1, TILE), work))
        if self._file is not None:
            at = self._start + rows.start * spec.columns * spec.dtype.itemsize
            self._file.write(at, out.view(np.uint8))

    def done(self) -> None:
        pass


class _SpanningJob(_SampleJob):
    """Shows one tensor to a statistic that spans the model."""

    def __init__(self, reader: MergeReader, index: int) -> None:
        super().__init__(reader, None, 0)
        self._index = reader.inner_passes + index
        self._merged = reader

    def finish(self, rows: Rows) -> None:
        self._merged.observe(self._index, rows)


_LOCAL = threading.local()


def _buffer(size: int) -> Array:
    """This thread's own bytes, grown where they are too few."""
    held: Array | None = getattr(_LOCAL, "out", None)
    if held is None or held.size < size:
        held = _LOCAL.out = np.empty(size, np.uint8)
    return held[:size]


class Sample:
    """Random models whose merge costs as much for each element as tensors of a kind do."""

    def __init__(self, kinds: Kinds, kind: Kind, folder: Path) -> None:
        self._kind = kind
        self._folder = folder
        self._plan = kinds.plan
        example = kind.example
        names = list(dict.fromkeys(model for model, _ in example.sources))
        types = dict(zip((m for m, _ in example.sources), kind.sources, strict=True))
        width = sum(DTYPES[name].itemsize for name in kind.sources)
        large = _shape(example.spec, _TENSOR_ELEMENTS)
        elements = int(np.prod(large, dtype=np.int64))
        count = max(4, min(64, _SAMPLE_BYTES // max(1, elements * width)))
        self._shapes = {f"large.{i}": large for i in range(count)}
        self._shapes |= {f"small.{i}": (4096,) for i in range(64)}
        rng = np.random.default_rng(0)
        block = rng.standard_normal(1 << 20, np.float32) * np.float32(0.02)
        models = {}
        for at, name in enumerate(names):
            tuned = block
            if example.base is None or name != example.base[0]:
                noise = rng.standard_normal(block.size, np.float32)
                tuned = block + noise * np.float32(0.002 + 0.001 * (at % 3))
            checkpoint = _memory(tuned, types[name], self._shapes)
            source = Source(name, None, Path(), checkpoint)
            models[name] = Model(name, source, LayerMap({}, {}, None))
        template = kinds.inputs.template.name
        template = template if template in models else names[0]
        self._inputs = Inputs(models, template)

    def _tensor(self, name: str) -> PlannedTensor:
        example = self._kind.example
        return replace(
            example,
            name=name,
            spec=TensorSpec(self._shapes[name], example.spec.dtype),
            models=tuple((model, name) for model, _ in example.models),
            base=(example.base[0], name) if example.base else None,
        )

    def element_seconds(self, threads: int, memory: int) -> float:
        """Seconds of one core for each element, all passes included."""
        names = [name for name in self._shapes if name.startswith("large")]
        elements = sum(self._tensor(name).spec.elements for name in names)
        return self._spent(names, threads, memory).busy / elements

    def tensor_seconds(self, threads: int, memory: int) -> float:
        """Seconds of one core for a tensor of few elements."""
        names = [name for name in self._shapes if name.startswith("small")]
        return self._spent(names, threads, memory).busy / len(names)

    def _spent(self, names: Sequence[str], threads: int, memory: int) -> Spent:
        """Medians of some merges of these tensors; the first, which compiles, is left out."""
        self._merge(names[: 2 * threads], threads, memory)
        return median([self._merge(names, threads, memory) for _ in range(_REPETITIONS)])

    def _merge(self, names: Sequence[str], threads: int, memory: int) -> Spent:
        tensors = {name: self._tensor(name) for name in names}
        merged = MergeCheckpoint(replace(self._plan, tensors=tensors, shards=()), self._inputs)
        held = memory if self._kind.kept else 0
        clock = Clock()
        statistic = merged.spanning
        index = 0
        while statistic is not None and index < statistic.passes:
            run_jobs(self._spanning(merged, names, index), threads, held, lambda _: None)
            statistic.settle(index)
            index += 1
        starts = list(itertools.accumulate((t.spec.nbytes for t in tensors.values()), initial=0))
        with _result(self._folder, starts[-1]) as file:
            jobs = (
                _SampleJob(merged.open(n), file, at) for n, at in zip(names, starts, strict=False)
            )
            run_jobs(jobs, threads, held, lambda _: None, file.abort)
            file.finish()
        return clock.read()

    @staticmethod
    def _spanning(merged: MergeCheckpoint, names: Sequence[str], index: int) -> Iterator[Job]:
        for name in names:
            reader = merged.open_spanning(name)
            if reader is not None:
                yield _SpanningJob(reader, index)

    def close(self) -> None:
        """Let go of the models."""
        self._inputs.close()


@contextlib.contextmanager
def _result(folder: Path, size: int) -> Iterator[SegmentedFile]:
    """A file of a result, on the disk that results go to: writing costs a core too."""
    with tempfile.TemporaryDirectory(prefix=".pack-rate-", dir=folder) as name:
        file = SegmentedFile(Path(name) / "sample", size)
        try:
            yield file
        finally:
            file.close()


def _shape(spec: TensorSpec, elements: int) -> tuple[int, ...]:
    """The matrix view of a tensor, cut to about so many elements."""
    if len(spec.shape) < 2:
        return (min(spec.elements, elements),)
    rows = min(spec.rows, max(1, elements // max(1, spec.columns)))
    return rows, spec.columns


def _memory(values: Array, dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> _MemoryCheckpoint:
    kind = DTYPES[dtype]
    block = np.zeros(values.size, kind.storage)
    if kind.is_float:
        encode(values.astype(np.float64) if dtype == "F64" else values, kind, block)
    places, content, at = {}, [], 0
    for name, shape in shapes.items():
        spec = TensorSpec(shape, kind)
        places[name] = _Place(at, spec)
        at += spec.nbytes
        whole, rest = divmod(spec.elements, block.size)
        content += [block] * whole + ([block[:rest]] if rest else [])
    return _MemoryCheckpoint(places, content)
