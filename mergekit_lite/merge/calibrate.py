"""What this machine does in a second, measured with the kernels and readers of a merge.

Random models of the types and parameters of a recipe lie in memory as files do in the page cache.
They are merged by the scheduler of a real run on as many threads, into a file in memory that is
written and hashed as files of a result are. Digests of inputs and the disk are measured by
themselves. The rates are kept in the user's cache folder under pack's version, the processor, the
threads and what was measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any, NamedTuple

import numpy as np

import mergekit_lite
from mergekit_lite.checkpoint.header import write_header
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.checkpoint.layers import LayerMap
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.kernels.cast import encode, in_kernel
from mergekit_lite.kernels.fuse import count_nonfinite
from mergekit_lite.kernels.jit import TILE
from mergekit_lite.merge.checkpoint import MergeCheckpoint, MergeReader
from mergekit_lite.merge.estimate import Kind, Kinds, Rates, Stored
from mergekit_lite.merge.inputs import Inputs, Model
from mergekit_lite.merge.plan import Plan, PlannedTensor
from mergekit_lite.merge.segments import SegmentedFile
from mergekit_lite.merge.stream import Job, run_jobs

__all__ = ["calibrate", "known_rates", "stored_of"]

_SAMPLE_BYTES = 256 * 10**6
_TENSOR_ELEMENTS = 8 << 20
_MOST_KINDS = 6
_REPETITIONS = 3
_DISK_BYTES = 256 << 20
_PIECE = 1 << 22


def known_rates(kinds: Kinds, threads: int) -> Rates | None:
    """Rates of a plan as they were measured before; None where its main kind was not.

    Args:
        kinds: Of the plan.
        threads: How many are busy at once.
    """
    machine = _load(_machine_key(kinds.plan, threads))
    found = {
        kind.signature: held["elements"]
        for kind in _measured(kinds)
        if (held := _load(_kind_key(kind, threads))) is not None
    }
    if machine is None or any(main not in found for main in list(kinds.kinds)[:1]):
        return None
    return Rates(elements=found, cores=threads, machine=_processor(), **machine)


def calibrate(
    kinds: Kinds,
    memory: int,
    threads: int,
    folder: Path,
    note: Callable[[str], None] = lambda _: None,
) -> Rates:
    """Measure what a plan needs of this machine, in some seconds, and remember it.

    Args:
        kinds: Of the plan; no weight of its models is read.
        memory: Bytes that may be held between the passes of a tensor.
        threads: How many are busy at once; more than there are cores make no sense.
        folder: Whose disk is measured; it must exist.
        note: Told what is measured.
    """
    elements = {}
    tensor = share = 0.0
    for kind in _measured(kinds):
        note(f"measuring {kind.signature}")
        sample = _Sample(kinds, kind)
        try:
            elements[kind.signature], got = sample.element_seconds(threads, memory)
            share = share or got
            tensor = tensor or sample.tensor_seconds(threads, memory)
        finally:
            sample.close()
        _keep(_kind_key(kind, threads), {"elements": elements[kind.signature]})
    note("measuring digests, disk and start")
    writing, reading = _disk(folder)
    start = _start(kinds.plan)
    machine = {
        "tensor": tensor,
        "hashing": _hashing(threads),
        "start": start.busy,
        "waiting": start.clock,
        "share": share or 1.0,
        "reading": reading,
        "writing": writing,
    }
    _keep(_machine_key(kinds.plan, threads), machine)
    return Rates(elements=elements, cores=threads, machine=_processor(), **machine)


def _measured(kinds: Kinds) -> list[Kind]:
    return list(kinds.kinds.values())[:_MOST_KINDS]


# Where rates are kept.


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pack" / "rates"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _key(*what: object) -> str:
    words = [mergekit_lite.__version__, _processor(), platform.node(), *map(str, what)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _kind_key(kind: Kind, threads: int) -> str:
    return _key("kind", kind.signature, threads)


def _machine_key(plan: Plan, threads: int) -> str:
    return _key("machine", plan.method.name, threads)


def _load(key: str) -> dict[str, float] | None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        held = json.loads((_folder() / f"{key}.json").read_text("ascii"))
        if isinstance(held, dict) and all(
            isinstance(v, float) and v >= 0 and v < float("inf") for v in held.values()
        ):
            return held
    return None


def _keep(key: str, rates: Mapping[str, float]) -> None:
    """Remember rates; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _folder() / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(rates), "ascii")
        beside.rename(path)


class _Spent(NamedTuple):
    """Seconds by the clock, and of processors."""

    clock: float
    busy: float


class _Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> _Spent:
        spent = os.times()
        children = spent.children_user + spent.children_system
        return _Spent(time.perf_counter(), time.process_time() + children)

    def read(self) -> _Spent:
        """What was spent since, programs included that this one started and that have ended."""
        now = self._now()
        return _Spent(now.clock - self._began.clock, max(1e-9, now.busy - self._began.busy))


def _median(spent: Sequence[_Spent]) -> _Spent:
    return _Spent(
        statistics.median(s.clock for s in spent), statistics.median(s.busy for s in spent)
    )


# A merge of random models.


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


class _Sample:
    """Random models whose merge costs as much for each element as tensors of a kind do."""

    def __init__(self, kinds: Kinds, kind: Kind) -> None:
        self._kind = kind
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

    def element_seconds(self, threads: int, memory: int) -> tuple[float, float]:
        """Seconds of one core for each element, all passes included; part of a core got."""
        names = [name for name in self._shapes if name.startswith("large")]
        elements = sum(self._tensor(name).spec.elements for name in names)
        spent = self._spent(names, threads, memory)
        return spent.busy / elements, spent.busy / spent.clock / threads

    def tensor_seconds(self, threads: int, memory: int) -> float:
        """Seconds of one core for a tensor of few elements."""
        names = [name for name in self._shapes if name.startswith("small")]
        return self._spent(names, threads, memory).busy / len(names)

    def _spent(self, names: Sequence[str], threads: int, memory: int) -> _Spent:
        """Medians of some merges of these tensors; the first, which compiles, is left out."""
        self._merge(names[: 2 * threads], threads, memory)
        return _median([self._merge(names, threads, memory) for _ in range(_REPETITIONS)])

    def _merge(self, names: Sequence[str], threads: int, memory: int) -> _Spent:
        tensors = {name: self._tensor(name) for name in names}
        merged = MergeCheckpoint(replace(self._plan, tensors=tensors, shards=()), self._inputs)
        held = memory if self._kind.kept else 0
        clock = _Clock()
        statistic = merged.spanning
        index = 0
        while statistic is not None and index < statistic.passes:
            _run(self._spanning(merged, names, index), threads, held)
            statistic.settle(index)
            index += 1
        starts = list(itertools.accumulate((t.spec.nbytes for t in tensors.values()), initial=0))
        with _result(starts[-1]) as file:
            jobs = (
                _SampleJob(merged.open(n), file, at) for n, at in zip(names, starts, strict=False)
            )
            _run(jobs, threads, held)
            file.finish()
        return clock.read()

    @staticmethod
    def _spanning(merged: MergeCheckpoint, names: Sequence[str], index: int) -> Iterator[Job]:
        for name in names:
            reader = merged.open_spanning(name)
            if reader is not None:
                yield _SpanningJob(reader, index)

    def close(self) -> None:
        self._inputs.close()


@contextlib.contextmanager
def _result(size: int) -> Iterator[SegmentedFile]:
    """A file of a result, in memory where the system has a place for that."""
    memory = Path("/dev/shm")  # noqa: S108
    room = memory.is_dir() and os.access(memory, os.W_OK) and disk_usage(memory).free > 2 * size
    with tempfile.TemporaryDirectory(prefix="pack-rate-", dir=memory if room else None) as name:
        file = SegmentedFile(Path(name) / "sample", size)
        try:
            yield file
        finally:
            file.close()


def _run(jobs: Iterator[Job], threads: int, memory: int) -> None:
    run_jobs(jobs, threads, memory, lambda _: None)


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


# Digest, disk, start.


def _hashing(threads: int) -> float:
    """Seconds of one core for each byte of SHA-256, while all threads hash."""
    data = np.random.default_rng(0).integers(0, 256, 4 * _PIECE, np.uint8)

    def work() -> None:
        digest = hashlib.sha256()
        for _ in range(4):
            for start in range(0, data.size, _PIECE):
                digest.update(data[start : start + _PIECE].data)

    def measure() -> _Spent:
        workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        clock = _Clock()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return clock.read()

    spent = _median([measure() for _ in range(_REPETITIONS)])
    return spent.busy / (threads * 4 * data.size)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes a second that the disk of a folder takes and gives, past the page cache."""
    page = np.frombuffer(mmap.mmap(-1, _PIECE), np.uint8)
    page[:] = np.random.default_rng(0).integers(0, 256, _PIECE, np.uint8)
    handle, name = tempfile.mkstemp(prefix=".pack-rate-", dir=folder)
    os.close(handle)
    try:
        fd = _past_cache(name, os.O_WRONLY)
        try:
            began = time.perf_counter()
            for at in range(0, _DISK_BYTES, _PIECE):
                os.pwrite(fd, page.data, at)
            os.fsync(fd)
            writing = _DISK_BYTES / (time.perf_counter() - began)
        finally:
            os.close(fd)
        fd = _past_cache(name, os.O_RDONLY)
        try:
            began = time.perf_counter()
            for at in range(0, _DISK_BYTES, _PIECE):
                os.preadv(fd, [page.data], at)
            return writing, _DISK_BYTES / (time.perf_counter() - began)
        finally:
            os.close(fd)
    finally:
        Path(name).unlink()


def _past_cache(name: str, flags: int) -> int:
    with contextlib.suppress(OSError):
        return os.open(name, flags | getattr(os, "O_DIRECT", 0) | os.O_CLOEXEC)
    return os.open(name, flags | os.O_CLOEXEC)


def _start(plan: Plan) -> _Spent:
    """Seconds of a merge of next to nothing by the same method, in a process of its own."""
    example = next((t for t in plan.tensors.values() if t.method == plan.method.name), None)
    models = len(example.models) if example is not None else 1
    with tempfile.TemporaryDirectory(prefix="pack-rate-") as name:
        folder = Path(name)
        recipe: dict[str, Any] = {
            "merge_method": plan.method.name,
            "models": [{"model": f"m{i}", "parameters": {"weight": 1.0}} for i in range(models)],
        }
        if example is not None:
            recipe["parameters"] = {
                key: value for key, value in example.parameters.items()
                if not plan.method.parameters[key].each
            }  # fmt: skip
            if not any(p.name == "weight" for p in plan.method.parameters.values()):
                recipe["models"] = [{"model": f"m{i}"} for i in range(models)]
        if plan.method.base:
            recipe["base_model"] = "base"
        for model in ["base", *(f"m{i}" for i in range(models))]:
            _tiny(folder / model)
        times = [_timed(folder, recipe) for _ in range(_REPETITIONS)]
    return _median(times)


def _tiny(folder: Path) -> None:
    folder.mkdir()
    tensors = [(f"layers.0.{i}.weight", DTYPES["BF16"], (64, 64)) for i in range(2)]
    prefix, _ = write_header(tensors, {"format": "pt"})
    data = np.random.default_rng(0).integers(0x3C00, 0x3E00, 2 * 64 * 64, np.uint16)
    (folder / "model.safetensors").write_bytes(prefix + data.tobytes())
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')


def _timed(folder: Path, recipe: Mapping[str, Any]) -> _Spent:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "mergekit_lite", "merge", str(file), "-q", "--force",
               "-o", str(folder / "out")]  # fmt: skip
    clock = _Clock()
    ran = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
    spent = clock.read()
    if ran.returncode and recipe["merge_method"] != "linear":
        models = [{"model": name, "parameters": {"weight": 1.0}} for name in ("m0", "base")]
        return _timed(folder, {"merge_method": "linear", "models": models})
    return spent


# What is known of the inputs without reading them.


def stored_of(inputs: Inputs) -> dict[str, Stored]:
    """How each model lies on the disk: what has no known digest, what memory does not hold."""
    return {name: _stored(model.source) for name, model in inputs.items()}


def _stored(source: Source) -> Stored:
    total = unknown = cold = 0.0
    for part in source.sources[:1]:  # adapters are small
        for path in _weights(part.path):
            stat = path.stat()
            total += stat.st_size
            unknown += stat.st_size * (KNOWN.find(stat) is None)
            cold += stat.st_size * (1 - _cached(path, stat.st_size))
    return Stored(unknown / total, cold / total) if total else Stored()


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [f for ending in ("safetensors", "bin", "gguf") for f in path.glob(f"*.{ending}")]
    return sorted(f for f in found if f.is_file())


def _cached(path: Path, size: int) -> float:
    """Share of a file that the page cache holds, of a few places; nothing is fetched for it."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None or size == 0:
        return 0.0
    found, places = 0, 16
    with path.open("rb", buffering=0) as file:
        for i in range(places):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], size * i // places, nowait) > 0
            except BlockingIOError:
                continue
            except OSError:
                return 0.0
    return found / places
