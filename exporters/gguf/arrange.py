"""A checkpoint seen under other names and with its rows in another order.

llama.cpp wants some tensors arranged otherwise than Hugging Face stores them. What is arranged is
again a checkpoint, read by rows from the one below, so that whatever writes it needs no tensor
whole and never knows whether the weights lie in files or are merged while they are read.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.kernels.cast import decode

__all__ = [
    "AS_IS", "ArrangedCheckpoint", "AsIs", "Constant", "Entry", "Interleaved", "Layout", "Placed",
    "Portion", "Regrouped", "Scaled", "Shifted", "Stacked", "Transposed",
]  # fmt: skip


class Layout(ABC):
    """How a tensor is arranged."""

    @abstractmethod
    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Shape and type of what becomes of a tensor."""

    @abstractmethod
    def open(self, reader: TensorReader) -> TensorReader:
        """Read a tensor arranged."""


class AsIs(Layout):
    """Nothing changes."""

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """The tensor's own."""
        return spec

    def open(self, reader: TensorReader) -> TensorReader:
        """The tensor's own reader."""
        return reader


AS_IS = AsIs()


@dataclass(frozen=True)
class Interleaved(Layout):
    """The two halves of each head's rows alternate.

    Rotary embeddings turn pairs of rows of a head. Hugging Face pairs row i of the first half with
    row i of the second; llama.cpp pairs neighbours, as the first release of its namesake did.

    Attributes:
        heads: Number of heads, which share the rows evenly.
    """

    heads: int

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """The tensor's own."""
        return spec

    def open(self, reader: TensorReader) -> TensorReader:
        """Read each half of a head where it lies."""
        return _InterleavedReader(reader, reader.spec.rows // self.heads)


@dataclass(frozen=True)
class Regrouped(Layout):
    """Equal groups of rows in another order: fused queries, keys and values.

    Attributes:
        order: For each group, where it lies in the tensor below.
    """

    order: tuple[int, ...]

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """The tensor's own."""
        return spec

    def open(self, reader: TensorReader) -> TensorReader:
        """Read each group where it lies."""
        return _RegroupedReader(reader, self.order)


@dataclass(frozen=True)
class Portion(Layout):
    """One of several equal portions of every expert's rows: gates and inputs that lie together.

    Attributes:
        index: Which one.
        count: How many there are.
    """

    index: int
    count: int

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """With fewer rows for each expert."""
        experts, rows, columns = spec.shape
        return TensorSpec((experts, rows // self.count, columns), spec.dtype)

    def open(self, reader: TensorReader) -> TensorReader:
        """Read each expert's portion where it lies."""
        return _PortionReader(reader, self.spec(reader.spec), self.index, self.count)


@dataclass(frozen=True)
class Transposed(Layout):
    """Rows and columns change places: layers that store ``(in, out)``, tokens of an embedding.

    The tensor is held whole while it is read.
    """

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """With the two dimensions swapped."""
        return TensorSpec(spec.shape[::-1], spec.dtype)

    def open(self, reader: TensorReader) -> TensorReader:
        """Read it once, then give its columns."""
        return _TransposedReader(reader, self.spec(reader.spec))


@dataclass(frozen=True)
class Scaled(Layout):
    """Another layout's tensor in float32, every element multiplied by a number.

    Attributes:
        layout: Comes first.
        factor: The number.
    """

    layout: Layout
    factor: float

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """In float32."""
        return TensorSpec(self.layout.spec(spec).shape, DTYPES["F32"])

    def open(self, reader: TensorReader) -> TensorReader:
        """Decode and multiply."""
        return _AffineReader(self.layout.open(reader), self.factor, 0.0)


@dataclass(frozen=True)
class Shifted(Layout):
    """A number is added to every element, in float32.

    Attributes:
        by: The number.
    """

    by: float

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """In float32."""
        return TensorSpec(spec.shape, DTYPES["F32"])

    def open(self, reader: TensorReader) -> TensorReader:
        """Decode and add."""
        return _AffineReader(reader, 1.0, self.by)


@dataclass(frozen=True)
class Placed:
    """A tensor under its new name.

    Attributes:
        name: In GGUF.
        source: Its name in the checkpoint below.
        layout: How it is arranged.
    """

    name: str
    source: str
    layout: Layout = AS_IS


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape, one upon the other in a new first dimension: experts of a layer.

    Attributes:
        name: In GGUF.
        sources: Their names in the checkpoint below, in order.
    """

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor that no checkpoint holds.

    Attributes:
        name: In GGUF.
        values: Float32.
    """

    name: str
    values: Array


Entry = Placed | Stacked | Constant
"""What a tensor of an arranged checkpoint is made of."""


class ArrangedCheckpoint(Checkpoint):
    """Tensors of a checkpoint, renamed and arranged, and constants beside them.

    Args:
        below: The checkpoint; closing it is left to whoever opened it.
        tensors: What is in the arranged one; in this order they are written.
    """

    def __init__(self, below: Checkpoint, tensors: Sequence[Entry]) -> None:
        self.label = below.label
        self.folder = below.folder
        self.config = below.config
        self.tensors: Mapping[str, Entry] = {entry.name: entry for entry in tensors}
        self._below = below

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor as it is arranged."""
        entry = self.tensors[name]
        if isinstance(entry, Constant):
            return TensorSpec(entry.values.shape, DTYPES["F32"])
        if isinstance(entry, Stacked):
            first = self._below.spec(entry.sources[0])
            return TensorSpec((len(entry.sources), *first.shape), first.dtype)
        return entry.layout.spec(self._below.spec(entry.source))

    def open(self, name: str) -> TensorReader:
        """Open a tensor for reading by rows."""
        entry = self.tensors[name]
        if isinstance(entry, Constant):
            return _ConstantReader(entry.values)
        if isinstance(entry, Stacked):
            return _StackedReader([self._below.open(s) for s in entry.sources], self.spec(name))
        return entry.layout.open(self._below.open(entry.source))

    def prefetch(self, name: str) -> None:
        """Ask for a tensor's bytes to be fetched in the background."""
        entry = self.tensors[name]
        if isinstance(entry, Placed):
            self._below.prefetch(entry.source)
        elif isinstance(entry, Stacked):
            for source in entry.sources:
                self._below.prefetch(source)

    def fingerprint(self) -> str:
        """That of the checkpoint below."""
        return self._below.fingerprint()

    def input_files(self) -> list[InputFile]:
        """Those of the checkpoint below."""
        return self._below.input_files()


class _Around(TensorReader):
    """A reader around another one, whose passes it hands on."""

    def __init__(self, inner: TensorReader, spec: TensorSpec) -> None:
        self.spec = spec
        self.passes = inner.passes
        self._inner = inner

    def observe(self, index: int, rows: Rows) -> None:
        """Every row is seen once, in whatever order they are later read."""
        self._inner.observe(index, rows)

    def settle(self, index: int) -> None:
        """Finish a pass of the tensor below; it may find that it needs another."""
        self._inner.settle(index)
        self.passes = self._inner.passes

    def resident_bytes(self) -> int:
        """What the tensor below would hold."""
        return self._inner.resident_bytes()

    def keep(self) -> None:
        """Let the tensor below hold what it reads."""
        self._inner.keep()

    def close(self) -> None:
        """Close the tensor below."""
        self._inner.close()


class _OutOfOrder(_Around):
    """Reads other rows of the tensor below than are asked for, so it must not keep chunks."""

    def resident_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    def keep(self) -> None:
        """Nothing is kept."""


class _InterleavedReader(_OutOfOrder):
    def __init__(self, inner: TensorReader, head: int) -> None:
        super().__init__(inner, inner.spec)
        self._head = head

    def read(self, rows: Rows, out: Array) -> None:
        columns = self.spec.columns
        target = out.reshape(rows.size, columns)
        for start, stop in _cut(rows, self._head):
            base = start - start % self._head
            pairs = Rows((start - base) // 2, (stop - base + 1) // 2)
            for half in (0, 1):
                first = base + half * (self._head // 2) + pairs.start
                held = np.empty((pairs.size, columns), out.dtype)
                self._inner.read(Rows(first, first + pairs.size), held.reshape(-1))
                # Where these rows come to lie; a range may begin or end in the middle of a pair.
                places = base + 2 * np.arange(pairs.start, pairs.stop) + half
                wanted = (places >= start) & (places < stop)
                target[places[wanted] - rows.start] = held[wanted]


def _cut(rows: Rows, size: int) -> Iterator[tuple[int, int]]:
    """Cut a range of rows where one group of so many rows ends and the next begins."""
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, start - start % size + size)
        yield start, stop
        start = stop


class _RegroupedReader(_OutOfOrder):
    def __init__(self, inner: TensorReader, order: tuple[int, ...]) -> None:
        super().__init__(inner, inner.spec)
        self._order = order
        self._rows = inner.spec.rows // len(order)

    def read(self, rows: Rows, out: Array) -> None:
        columns, at = self.spec.columns, 0
        for start, stop in _cut(rows, self._rows):
            group, inside = divmod(start, self._rows)
            first = self._order[group] * self._rows + inside
            count = stop - start
            self._inner.read(Rows(first, first + count), out[at * columns : (at + count) * columns])
            at += count


class _PortionReader(_OutOfOrder):
    def __init__(self, inner: TensorReader, spec: TensorSpec, index: int, count: int) -> None:
        super().__init__(inner, spec)
        self._rows = spec.shape[1]
        self._index = index
        self._count = count

    def observe(self, index: int, rows: Rows) -> None:
        # Every portion has a reader of its own below, which must see the tensor whole.
        for chunk in range(rows.start * self._count, rows.stop * self._count, max(1, rows.size)):
            stop = min(chunk + max(1, rows.size), rows.stop * self._count)
            self._inner.observe(index, Rows(chunk, stop))

    def read(self, rows: Rows, out: Array) -> None:
        columns, at = self.spec.columns, 0
        for start, stop in _cut(rows, self._rows):
            expert, inside = divmod(start, self._rows)
            first = (expert * self._count + self._index) * self._rows + inside
            count = stop - start
            self._inner.read(Rows(first, first + count), out[at * columns : (at + count) * columns])
            at += count


class _StackedReader(TensorReader):
    """Readers of the stacked tensors; their passes are gone through side by side."""

    def __init__(self, inner: Sequence[TensorReader], spec: TensorSpec) -> None:
        self.spec = spec
        self.passes = max(reader.passes for reader in inner)
        self._inner = inner
        self._rows = spec.shape[1] if len(spec.shape) > 2 else 1

    def observe(self, index: int, rows: Rows) -> None:
        # Chunks here end elsewhere than chunks of the tensors do: show them whole, with the first.
        for reader in self._inner if rows.start == 0 else ():
            if index < reader.passes:
                for chunk in reader.spec.chunks():
                    reader.observe(index, chunk)

    def settle(self, index: int) -> None:
        for reader in self._inner:
            if index < reader.passes:
                reader.settle(index)
        self.passes = max(reader.passes for reader in self._inner)

    def read(self, rows: Rows, out: Array) -> None:
        at = 0
        for start, stop in _cut(rows, self._rows):
            tensor, inside = divmod(start, self._rows)
            count = (stop - start) * self.spec.columns
            self._inner[tensor].read(Rows(inside, inside + stop - start), out[at : at + count])
            at += count

    def close(self) -> None:
        for reader in self._inner:
            reader.close()


class _TransposedReader(_OutOfOrder):
    def __init__(self, inner: TensorReader, spec: TensorSpec) -> None:
        super().__init__(inner, spec)
        self._held: Array | None = None
        self._lock = threading.Lock()

    def observe(self, index: int, rows: Rows) -> None:
        # Rows here are columns there: show it the whole tensor in the first piece.
        if rows.start == 0:
            for chunk in self._inner.spec.chunks():
                self._inner.observe(index, chunk)

    def read(self, rows: Rows, out: Array) -> None:
        with self._lock:
            if self._held is None:
                source = self._inner.spec
                self._held = np.empty((source.rows, source.columns), source.dtype.storage)
                for chunk in source.chunks():
                    self._inner.read(chunk, self._held[chunk.start : chunk.stop].reshape(-1))
        out.reshape(rows.size, self.spec.columns)[:] = self._held[:, rows.start : rows.stop].T

    def close(self) -> None:
        self._held = None
        super().close()


class _AffineReader(_Around):
    def __init__(self, inner: TensorReader, factor: float, shift: float) -> None:
        super().__init__(inner, replace(inner.spec, dtype=DTYPES["F32"]))
        self._factor = np.float32(factor)
        self._shift = np.float32(shift)

    def read(self, rows: Rows, out: Array) -> None:
        dtype = self._inner.spec.dtype
        stored = np.empty(out.size, dtype.storage)
        self._inner.read(rows, stored)
        decode(stored, dtype, out)
        out *= self._factor
        out += self._shift


class _ConstantReader(TensorReader):
    def __init__(self, values: Array) -> None:
        self.spec = TensorSpec(values.shape, DTYPES["F32"])
        self._values = np.ascontiguousarray(values, np.float32).reshape(-1)

    def read(self, rows: Rows, out: Array) -> None:
        columns = self.spec.columns
        out[:] = self._values[rows.start * columns : rows.stop * columns]
