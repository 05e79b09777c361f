"""GGUF files, streamed: every tensor's place is known before its first byte is.

The head of a file (metadata, then the tensors' names, shapes, types and offsets) is laid out from
headers alone. Then threads read each chunk once, encode it for every file that was asked for, and
write it at its place; the bytes depend on the tensors alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from exporters.gguf.metadata import Metadata, encode_metadata, encode_text, i32, u16
from mergekit_lite.checkpoint.announce import announce
from mergekit_lite.checkpoint.header import Entry, Header
from mergekit_lite.checkpoint.protocol import Checkpoint, Rows, TensorSpec
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.blocks.types import TensorType
from mergekit_lite.kernels.cast import decode
from mergekit_lite.kernels.reduce import largest_magnitude
from mergekit_lite.merge.buffers import BufferPool
from mergekit_lite.merge.plan import Shard
from mergekit_lite.merge.segments import SegmentedFile
from mergekit_lite.merge.stream import Job, run_jobs
from mergekit_lite.merge.writer import OutputFile, explained, sync_folder

__all__ = ["ALIGNMENT", "Kinds", "Sink", "Target", "encode_jobs", "lay_out", "write_file"]

ALIGNMENT = 32
"""Every tensor begins at a multiple of so many bytes; the format's default."""

Kinds = Mapping[str, TensorType]
"""The type of each tensor, in their order in the file."""

_MAGIC = b"GGUF"
_VERSION = 3
_LONGEST_NAME = 63
_MOST_DIMENSIONS = 4
_LARGEST_SCALE = 65504.0
_POOL = BufferPool()


class Sink(Protocol):
    """What takes the bytes of tensors."""

    def write(self, name: str, offset: int, data: Array) -> None:
        """Take bytes of a tensor, ``offset`` from its start; from any thread."""

    def tensor_done(self, name: str, nonfinite: int) -> None:
        """All of a tensor has been written."""


@dataclass(frozen=True)
class Target:
    """One of the files that are made of the tensors.

    Attributes:
        kinds: Type of each tensor.
        sink: Where its bytes go.
        names: Tensors that are to be written; others are there already.
        importance: Importance of columns by tensor, float32 ``(columns,)`` or, of stacked experts,
            ``(experts, columns)``.
    """

    kinds: Kinds
    sink: Sink
    names: frozenset[str]
    importance: Mapping[str, Array]


def lay_out(
    metadata: Metadata,
    tensors: Checkpoint,
    kinds: Kinds,
    stem: str,
    split_bytes: int | None = None,
) -> list[Shard]:
    """Plan a file, or the parts of one that is split.

    Args:
        metadata: Keys and values.
        tensors: Where the tensors are read from; only their specs are asked for.
        kinds: Type of each tensor, in their order.
        stem: Name without ``.gguf``.
        split_bytes: Most bytes of tensors in a file that holds more than one; None for one file.

    Raises:
        PackError: A tensor cannot be stored in its type.
    """
    for name, kind in kinds.items():
        _check(name, tensors.spec(name), kind, tensors.label)
    groups = _groups(tensors, kinds, split_bytes)
    if len(groups) == 1:
        return [_file(f"{stem}.gguf", metadata, tensors, groups[0])]
    shards = []
    for number, group in enumerate(groups):
        # Names and keys of parts: gguf-split of llama.cpp.
        split = {
            "split.no": u16(number),
            "split.tensors.count": i32(len(kinds)),
            "split.count": u16(len(groups)),
        }
        name = f"{stem}-{number + 1:05}-of-{len(groups):05}.gguf"
        shards.append(_file(name, {**({} if number else metadata), **split}, tensors, group))
    return shards


def _groups(tensors: Checkpoint, kinds: Kinds, split_bytes: int | None) -> list[Kinds]:
    groups: list[dict[str, TensorType]] = [{}]
    held = 0
    for name, kind in kinds.items():
        size = _aligned(_nbytes(tensors.spec(name), kind))
        if split_bytes is not None and groups[-1] and held + size > split_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = kind
        held += size
    return list(groups)


def _file(name: str, metadata: Metadata, tensors: Checkpoint, kinds: Kinds) -> Shard:
    infos = bytearray()
    places: list[tuple[str, TensorSpec, int, int]] = []
    at = 0
    for tensor, kind in kinds.items():
        spec = tensors.spec(tensor)
        infos += encode_text(tensor) + struct.pack("<I", len(spec.shape))
        infos += struct.pack(f"<{len(spec.shape)}Q", *reversed(spec.shape))
        infos += struct.pack("<IQ", kind.number, at)
        size = _aligned(_nbytes(spec, kind))
        places.append((tensor, spec, at, size))
        at += size
    head = _MAGIC + struct.pack("<IQQ", _VERSION, len(places), len(metadata))
    head += encode_metadata(metadata) + bytes(infos)
    head += bytes(_aligned(len(head)) - len(head))
    entries = {
        tensor: Entry(spec.dtype, spec.shape, len(head) + start, len(head) + start + size)
        for tensor, spec, start, size in places
    }
    return Shard(name, head, Header(entries, {}, len(head)))


def _aligned(count: int) -> int:
    return count + -count % ALIGNMENT


def _nbytes(spec: TensorSpec, kind: TensorType) -> int:
    return spec.rows * kind.row_bytes(spec.columns)


def _check(name: str, spec: TensorSpec, kind: TensorType, label: str) -> None:
    if not spec.dtype.is_float or not spec.elements:
        raise PackError(
            f"{label}: '{name}' is {spec.dtype.name} {list(spec.shape)}; "
            "GGUF takes weights in floating point here",
            "Give the model in bfloat16, float16 or float32.",
        )
    fits = len(name.encode()) <= _LONGEST_NAME and 1 <= len(spec.shape) <= _MOST_DIMENSIONS
    if not fits:
        raise PackError(
            f"{label}: '{name}' {list(spec.shape)} does not fit into GGUF",
            f"Names have at most {_LONGEST_NAME} bytes, shapes {_MOST_DIMENSIONS} dimensions.",
        )
    if spec.columns % kind.block:
        raise PackError(
            f"{label}: rows of '{name}' have {spec.columns} elements, "
            f"{kind.name} needs a multiple of {kind.block}",
            f"Choose another type for it: --tensor-type {name}=q8_0",
        )


class _EncodeJob(Job):
    """Reads one tensor, encodes it for every target and writes it."""

    def __init__(self, name: str, tensors: Checkpoint, targets: Sequence[Target]) -> None:
        super().__init__(tensors.open(name))
        self._name = name
        self._label = tensors.label
        self._targets = targets

    def finish(self, rows: Rows) -> None:
        """Read some rows once; encode and write them for each target."""
        spec = self.reader.spec
        count = rows.size * spec.columns
        held = _POOL.take(count * 4)
        values = held[: count * 4].view(np.float32)
        if spec.dtype.name == "F32":
            self.reader.read(rows, values)
        else:
            raw = _POOL.take(count * spec.dtype.itemsize)
            stored = raw[: count * spec.dtype.itemsize].view(spec.dtype.storage)
            self.reader.read(rows, stored)
            decode(stored, spec.dtype, values)
            _POOL.give(raw)
        largest = largest_magnitude(values)
        matrix = values.reshape(rows.size, spec.columns)
        for target in self._targets:
            kind = target.kinds[self._name]
            self._check_values(largest, kind)
            size = kind.row_bytes(spec.columns)
            buffer = _POOL.take(rows.size * size)
            out = buffer[: rows.size * size].reshape(rows.size, size)
            for part, importance in self._parts(rows, target):
                inside = slice(part.start - rows.start, part.stop - rows.start)
                kind.encode(matrix[inside], importance, out[inside])
            target.sink.write(self._name, rows.start * size, out.reshape(-1))
            _POOL.give(buffer)
        _POOL.give(held)

    def _parts(self, rows: Rows, target: Target) -> Iterator[tuple[Rows, Array | None]]:
        """Cut rows where another expert begins, whose columns have an importance of their own."""
        importance = target.importance.get(self._name)
        if importance is None or importance.ndim == 1:
            yield rows, importance
            return
        each = self.reader.spec.rows // importance.shape[0]
        start = rows.start
        while start < rows.stop:
            stop = min(rows.stop, (start // each + 1) * each)
            yield Rows(start, stop), importance[start // each]
            start = stop

    def _check_values(self, largest: float, kind: TensorType) -> None:
        if not np.isfinite(largest):
            raise PackError(
                f"{self._label}: '{self._name}' holds NaN or infinity",
                "Find the broken source: pack inspect, or merge again without it.",
            )
        if largest > _LARGEST_SCALE and kind.name not in ("F32", "BF16"):
            raise PackError(
                f"{self._label}: '{self._name}' holds {largest:.6g}, which is too large for "
                f"{kind.name}",
                f"Keep it in a wider type: --tensor-type {self._name}=bf16",
            )

    def done(self) -> None:
        """Pad to where the next tensor begins."""
        spec = self.reader.spec
        for target in self._targets:
            size = _nbytes(spec, target.kinds[self._name])
            padding = np.zeros(_aligned(size) - size, np.uint8)
            if padding.size:
                target.sink.write(self._name, size, padding)
            target.sink.tensor_done(self._name, 0)


def encode_jobs(tensors: Checkpoint, targets: Sequence[Target]) -> Iterator[Job]:
    """The work of writing all targets, in the order in which their files hold the tensors."""
    every = [n for n in targets[0].kinds if any(n in target.names for target in targets)]
    announce(tensors.prefetch, every)
    for at, name in enumerate(every):
        for ahead in every[at + 1 : at + 3] if at else every[:3]:
            tensors.prefetch(ahead)
        yield _EncodeJob(name, tensors, [target for target in targets if name in target.names])


class _File:
    """A sink that is a file by itself."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._entries = shard.header.entries
        self.file = SegmentedFile(path, shard.size)
        self.file.write(0, np.frombuffer(shard.prefix, np.uint8))

    def write(self, name: str, offset: int, data: Array) -> None:
        self.file.write(self._entries[name].start + offset, data.reshape(-1).view(np.uint8))

    def tensor_done(self, name: str, nonfinite: int) -> None:
        pass


def write_file(
    path: Path,
    metadata: Metadata,
    tensors: Checkpoint,
    kinds: Kinds,
    *,
    threads: int = 1,
    memory: int = 448 * 10**6,
    progress: Callable[[int], None] = lambda _: None,
) -> OutputFile:
    """Write a single file; nothing is left of it if that fails.

    Args:
        path: Where it goes; what is there is replaced.
        metadata: Keys and values.
        tensors: Where the tensors are read from.
        kinds: Type of each tensor, in their order in the file.
        threads: Worker threads; they change no byte.
        memory: Bytes that tensors with several passes may hold.
        progress: Told the bytes that were read, as they are.

    Raises:
        PackError: A tensor holds NaN or infinity, or too large a number; the disk is full.
        Interrupted: The user stopped it.
    """
    [shard] = lay_out(metadata, tensors, kinds, path.stem)
    beside = path.with_name(f".{path.name}.partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            sink = _File(beside, shard)
            try:
                targets = [Target(kinds, sink, frozenset(kinds), {})]
                jobs = encode_jobs(tensors, targets)
                run_jobs(jobs, threads, memory, progress, sink.file.abort)
                sha256 = sink.file.finish()
            finally:
                sink.file.close()
            beside.rename(path)
            sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    return OutputFile(path.name, shard.size, sha256)
