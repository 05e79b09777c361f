"""A recipe that has not run, as a checkpoint: ask it for a tensor, and that tensor is merged."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mergekit_lite.adapters.checkpoint import AdaptedReader
from mergekit_lite.checkpoint.protocol import Checkpoint, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.cast import decode, encode, in_kernel
from mergekit_lite.kernels.random import key_of
from mergekit_lite.merge.buffers import BufferPool, padded
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.merge.plan import Plan, PlannedTensor
from mergekit_lite.methods.base import Chunk, Method, Scratch, Statistic, TensorContext

__all__ = ["MergeCheckpoint", "MergeReader"]

_NOTHING = np.empty(0, np.float32)


class MergeCheckpoint(Checkpoint):
    """The result of a plan.

    A method whose statistic spans the model must have `spanning` observed and settled for every
    tensor before the first one is opened; `merge.run` does so.
    """

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.label = plan.recipe.name or "merge"
        self.folder = None
        self.config = inputs.template.checkpoint.config
        self._plan = plan
        self._inputs = inputs
        self._local = threading.local()
        self._pool = BufferPool()
        self.spanning = self._spanning_statistic()

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self._plan.tensors)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self._plan.tensors[name].spec

    def open(self, name: str) -> TensorReader:
        """Open a tensor: nothing is computed before it is read."""
        planned = self._plan.tensors[name]
        if planned.method == "copy":
            model, tensor = planned.models[0]
            return self._inputs[model].checkpoint.open(tensor)
        context = self._context(planned)
        arguments = self.arguments(planned)
        statistic = self.spanning or self._plan.method.statistic(context, **arguments)
        readers = [self._inputs[m].checkpoint.open(tensor) for m, tensor in planned.sources]
        return MergeReader(
            planned, self._plan.method, context, arguments, readers, statistic,
            owns_statistic=self.spanning is None, local=self._local, pool=self._pool,
        )  # fmt: skip

    def open_spanning(self, name: str) -> MergeReader | None:
        """Open a tensor for the statistic that spans the model; None where it takes no part."""
        planned = self._plan.tensors[name]
        if planned.method == "copy" or self.spanning is None:
            return None
        readers = [self._inputs[m].checkpoint.open(tensor) for m, tensor in planned.sources]
        return MergeReader(
            planned, self._plan.method, self._context(planned), {}, readers, self.spanning,
            owns_statistic=False, local=self._local, pool=self._pool,
        )  # fmt: skip

    def prefetch(self, name: str) -> None:
        """Ask for the sources' bytes to be fetched in the background."""
        for model, tensor in self._plan.tensors[name].sources:
            self._inputs[model].checkpoint.prefetch(tensor)

    def arguments(self, planned: PlannedTensor) -> dict[str, Any]:
        """A tensor's parameters as the method's keyword arguments."""
        return {
            parameter.argument: np.array(planned.parameters[name], np.float64)
            if parameter.each
            else planned.parameters[name]
            for name, parameter in self._plan.method.parameters.items()
        }

    def _context(self, planned: PlannedTensor) -> TensorContext:
        spec = planned.spec
        seen: dict[str, int] = {}
        keys = []
        for model, _ in planned.models:
            seen[model] = seen.get(model, 0) + 1
            again = (seen[model],) if seen[model] > 1 else ()
            keys.append(key_of(self._plan.recipe.seed, model, planned.name, *again))
        return TensorContext(
            elements=spec.elements,
            block=spec.block_rows * spec.columns,
            columns=spec.columns,
            models=len(planned.models),
            work=self._plan.work,
            keys=np.array(keys, np.uint64),
        )

    def _spanning_statistic(self) -> Statistic | None:
        method = self._plan.method
        merged = [t for t in self._plan.tensors.values() if t.method == method.name]
        if not merged or not method.spans_model(merged[0].parameters):  # type: ignore[arg-type]
            return None
        whole = replace(
            self._context(merged[0]), elements=sum(t.spec.elements for t in merged), columns=0
        )
        return method.statistic(whole, **self.arguments(merged[0]))


class MergeReader(TensorReader):
    """One tensor of a merge: gathers the sources' rows, and lets the method combine them."""

    def __init__(
        self,
        planned: PlannedTensor,
        method: Method,
        context: TensorContext,
        arguments: Mapping[str, Any],
        readers: Sequence[TensorReader],
        statistic: Statistic | None,
        *,
        owns_statistic: bool,
        local: threading.local,
        pool: BufferPool,
    ) -> None:
        self.spec = planned.spec
        self._method = method
        self._context = context
        self._arguments = dict(arguments)
        self._readers = readers
        self._has_base = planned.base is not None
        self._statistic = statistic
        if statistic is not None or "statistic" in method.keywords:
            self._arguments["statistic"] = statistic
        self._inner = max((reader.passes for reader in readers), default=0)
        self._own = statistic if owns_statistic else None
        self._local = local
        self._pool = pool
        self._kept: dict[int, Array] | None = None
        types = {reader.spec.dtype for reader in readers}
        first = readers[0].spec.dtype
        self._native = len(types) == 1 and in_kernel(first)
        self._gathered = first.storage if self._native else context.work
        self._shared = _shared(readers, self._gathered)

    @property
    def passes(self) -> int:  # type: ignore[override]
        """Passes of the sources, then those of the statistic, which may grow as it goes."""
        return self._inner + (self._own.passes if self._own is not None else 0)

    @property
    def inner_passes(self) -> int:
        """Passes that the sources need, before those of the method."""
        return self._inner

    @property
    def far(self) -> bool:
        """Whether any source is."""
        return any(reader.far for reader in self._readers)

    def resident_bytes(self) -> int:
        """Bytes of all sources as they are gathered, and what these hold themselves."""
        own = self.spec.elements * self._gathered.itemsize * len(self._readers)
        inner = sum(reader.resident_bytes() for reader in self._readers if reader.passes)
        return inner + (own if self._own is not None else 0)

    def keep(self) -> None:
        """Hold gathered rows between passes, and let sources that have passes hold theirs."""
        self._kept = {} if self._own is not None else None
        for reader in self._readers:
            if reader.passes:
                reader.keep()

    def close(self) -> None:
        """Let go of held rows, and of the sources."""
        for block in (self._kept or {}).values():
            self._pool.give(block)
        self._kept = None
        for reader in self._readers:
            reader.close()

    def observe(self, index: int, rows: Rows) -> None:
        """Let the sources, then the method's statistic, see one chunk."""
        if index < self._inner:
            for reader in self._readers:
                if index < reader.passes:
                    reader.observe(index, rows)
        elif self._statistic is not None:
            gathered = self._kept.get(rows.start) if self._kept is not None else None
            if gathered is None:
                gathered = self._gather(rows)
            self._statistic.observe(index - self._inner, self._chunk(rows, gathered, _NOTHING))

    def settle(self, index: int) -> None:
        """Finish a pass of the sources, or of the statistic."""
        if index < self._inner:
            for reader in self._readers:
                if index < reader.passes:
                    reader.settle(index)
        elif self._statistic is not None:
            self._statistic.settle(index - self._inner)

    def read(self, rows: Rows, out: Array) -> None:
        """Merge some rows."""
        native = in_kernel(self.spec.dtype)
        target = out if native else np.empty(out.size, self._context.work)
        held = self._kept.pop(rows.start, None) if self._kept is not None else None
        gathered = self._gather(rows, final=True) if held is None else held
        self._method.combine(self._chunk(rows, gathered, target), **self._arguments)
        if held is not None:
            self._pool.give(held)
        if not native:
            encode(target, self.spec.dtype, out)

    def _chunk(self, rows: Rows, gathered: Array, out: Array) -> Chunk:
        models = len(self._readers) - self._has_base
        return Chunk(
            models=gathered[:models],
            base=gathered[models] if self._has_base else None,
            out=out,
            first=rows.start * self.spec.columns,
            tensor=self._context,
            scratch=self._scratch(),
        )

    def _gather(self, rows: Rows, *, final: bool = False) -> Array:
        """Read rows of all sources, ``(sources, elements)``; held if this reader keeps."""
        count = rows.size * self.spec.columns
        shape = (len(self._readers), count)
        size = shape[0] * count * self._gathered.itemsize
        keep = self._kept is not None and not final
        buffer = self._pool.take(size) if keep else self._reused(size)
        block = buffer.view(self._gathered)[: shape[0] * count].reshape(shape)
        taken = {i for group in self._shared for i in group}
        for i, reader in enumerate(self._readers):
            if i not in taken:
                self._read(reader, rows, block[i])
        for group in self._shared:
            self._read_group(group, rows, block)
        if keep and self._kept is not None:
            self._kept[rows.start] = block
        return block

    def _read(self, reader: TensorReader, rows: Rows, out: Array) -> None:
        """Read rows of one source in the type in which they are gathered."""
        if reader.spec.dtype.storage == self._gathered and in_kernel(reader.spec.dtype):
            reader.read(rows, out)
        else:
            stored = np.empty(out.size, reader.spec.dtype.storage)
            reader.read(rows, stored)
            decode(stored, reader.spec.dtype, out)

    def _read_group(self, group: Sequence[int], rows: Rows, block: Array) -> None:
        """Read sources that begin with the same rows of a base: those once, then adapt copies."""
        leader = group[0]
        first = self._readers[leader]
        if isinstance(first, AdaptedReader):
            first.read_base(rows, block[leader])
        else:
            self._read(first, rows, block[leader])
        for i in group[1:]:
            reader = self._readers[i]
            if isinstance(reader, AdaptedReader):
                reader.change(rows, block[leader], block[i])
            else:
                block[i] = block[leader]
        if isinstance(first, AdaptedReader):
            first.change(rows, block[leader], block[leader])

    def _reused(self, size: int) -> Array:
        """This thread's own buffer, grown where it is too small."""
        buffer: Array | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < size:
            buffer = self._local.buffer = np.empty(padded(size), np.uint8)
        return buffer[: size + -size % 8]

    def _scratch(self) -> Scratch:
        key = (self._context.models, self._context.work)
        held: tuple[object, Scratch] | None = getattr(self._local, "scratch", None)
        if held is None or held[0] != key:
            held = self._local.scratch = (key, Scratch(*key))
        return held[1]


def _shared(readers: Sequence[TensorReader], gathered: np.dtype[Any]) -> list[list[int]]:
    """Groups of sources that are one tensor of a base with different adapters, or with none.

    A source without adapters leads its group.
    """
    groups: dict[object, list[int]] = {}
    for i, reader in enumerate(readers):
        if reader.origin is not None:
            groups.setdefault(reader.origin, []).append(i)
    adapted = [
        isinstance(reader, AdaptedReader) and reader.spec.dtype.storage == gathered
        for reader in readers
    ]
    return [
        sorted(group, key=lambda i: (adapted[i], i))
        for group in groups.values()
        if len(group) > 1 and any(adapted[i] for i in group)
    ]
