"""What fine-tunes changed in their base, tensor by tensor, in one pass over the weights."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mergekit_lite.analyse.sums import Sums
from mergekit_lite.checkpoint.announce import announce
from mergekit_lite.checkpoint.layers import Layer, map_layers
from mergekit_lite.checkpoint.protocol import Checkpoint, Rows, TensorReader, TensorSpec
from mergekit_lite.checkpoint.quantized import is_packed
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.cast import decode
from mergekit_lite.kernels.differ import compare
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.stream import Job, run_jobs

__all__ = ["Diff", "Group", "TensorDiff", "compare_models"]

_HELD_BYTES = 256 * 10**6
_NUMBERED = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorDiff:
    """One tensor.

    Attributes:
        name: Its name.
        layer: Its place in a stack of layers; None outside.
        shape: Its shape.
        sums: What was found.
    """

    name: str
    layer: Layer | None
    shape: tuple[int, ...]
    sums: Sums

    @property
    def kind(self) -> str:
        """What it is called in every layer, experts alike; outside the layers, its name."""
        name = self.name if self.layer is None else _NUMBERED.sub("*", self.layer.rest)[1:]
        return name.removesuffix(".weight")


@dataclass(frozen=True)
class Group:
    """Tensors of one kind: what every layer of a stack has, or one tensor outside.

    Attributes:
        stack: Prefix of the stack; None outside.
        kind: See `TensorDiff.kind`.
        tensors: In the order of the layers.
    """

    stack: str | None
    kind: str
    tensors: Sequence[TensorDiff]

    @cached_property
    def sums(self) -> Sums:
        """Over all of them."""
        return _total(self.tensors)

    @cached_property
    def layers(self) -> dict[int, Sums]:
        """By layer; empty outside."""
        found: dict[int, list[TensorDiff]] = {}
        for tensor in self.tensors:
            if tensor.layer is not None:
                found.setdefault(tensor.layer.index, []).append(tensor)
        return {index: _total(found[index]) for index in sorted(found)}


@dataclass(frozen=True)
class Diff:
    """A comparison.

    Attributes:
        base: How the user named the base.
        models: How the user named the models.
        tensors: Those that all have in one shape, by stack and layer.
        others: Why other tensors were left out, by name.
        notes: What a reader should know.
    """

    base: str
    models: Sequence[str]
    tensors: Sequence[TensorDiff]
    others: Mapping[str, str]
    notes: Sequence[str] = ()

    @cached_property
    def sums(self) -> Sums:
        """Over all tensors."""
        return _total(self.tensors)

    @cached_property
    def groups(self) -> list[Group]:
        """Kinds of tensors, stack by stack; what is outside stands where its name sorts."""
        found: dict[tuple[str | None, str], list[TensorDiff]] = {}
        for tensor in self.tensors:
            stack = tensor.layer.prefix if tensor.layer else None
            found.setdefault((stack, tensor.kind if stack else tensor.name), []).append(tensor)
        return [Group(stack, tensors[0].kind, tensors) for (stack, _), tensors in found.items()]

    @cached_property
    def stacks(self) -> list[str]:
        """Prefixes of the stacks."""
        return list(dict.fromkeys(g.stack for g in self.groups if g.stack is not None))

    def label(self, group: Group) -> str:
        """What to call a group, in words that no other group has."""
        return self._labels[group.stack, group.tensors[0].name]

    @cached_property
    def _labels(self) -> dict[tuple[str | None, str], str]:
        """With their stack, or as a whole name, only what would be called alike."""
        taken = Counter(group.kind for group in self.groups)
        several = len(self.stacks) > 1
        labels = {}
        for group in self.groups:
            name, label = group.tensors[0].name, group.kind
            if group.stack is None and taken[group.kind] > 1:
                label = name
            elif group.stack is not None and (several or taken[group.kind] > 1):
                label = f"{group.stack}*.{group.kind}"
            labels[group.stack, name] = label
        return labels

    def not_finite(self) -> list[tuple[str, str, int]]:
        """Tensors that hold NaN or infinity: of which model, name, how many elements."""
        columns: list[tuple[int | None, str]] = [(None, self.base), *enumerate(self.models)]
        return [
            (label, tensor.name, count)
            for tensor in self.tensors
            for model, label in columns
            if (count := tensor.sums.not_finite(model))
        ]


def _total(tensors: Sequence[TensorDiff]) -> Sums:
    models = len(tensors[0].sums.each)
    return Sums.over(models, [tensor.sums for tensor in tensors])


def compare_models(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    threads: int,
    progress: Progress,
) -> Diff:
    """Compare models with their base.

    Memory does not depend on the models' size: each thread holds one chunk of every model.

    Args:
        base: What they are compared with.
        models: One or more.
        names: How the user named the base and the models.
        threads: Worker threads; they change no bit of the result.
        progress: Told how far it is.

    Raises:
        PackError: There is no tensor that all have.
    """
    every = [base, *models]
    common, others = _common(every, names)
    if not common:
        raise PackError(_nothing_common(others), "See what each of them is: pack inspect PATH")
    layers = map_layers(common, base.config)
    progress.begin("Compare", sum(model.spec(name).nbytes for model in every for name in common))
    results: dict[str, Sums] = {}
    run_jobs(_jobs(common, every, results), threads, _HELD_BYTES, progress.advance)
    tensors = [
        TensorDiff(name, layers.layers.get(name), base.spec(name).shape, results[name])
        for name in sorted(common, key=lambda n: _order(n, layers.layers.get(n)))
    ]
    return Diff(names[0], names[1:], tensors, others, _notes(every, names, common))


def _order(name: str, layer: Layer | None) -> tuple[str, int, str]:
    return (name, 0, "") if layer is None else (layer.prefix, layer.index, layer.rest)


def _common(every: Sequence[Checkpoint], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Tensors that all have in one shape, and why others are left out."""
    sets = [set(model.names()) for model in every]
    common, others = [], {}
    for name in sorted(set.union(*sets)):
        missing = [label for label, held in zip(names, sets, strict=True) if name not in held]
        if missing:
            others[name] = f"not in {', '.join(missing)}"
            continue
        specs = [model.spec(name) for model in every]
        if len({spec.shape for spec in specs}) > 1:
            others[name] = "differs in shape: " + ", ".join(str(list(s.shape)) for s in specs)
        elif not all(spec.dtype.is_float for spec in specs):
            others[name] = "is not of a floating-point type"
        else:
            common.append(name)
    return common, others


def _nothing_common(others: Mapping[str, str]) -> str:
    """Why nothing can be compared, with the first tensor as an example."""
    example = next(iter(others.items()), None)
    text = "the models have no tensor in common"
    return f"{text} (of {len(others)}; '{example[0]}' {example[1]})" if example else text


def _notes(every: Sequence[Checkpoint], names: Sequence[str], common: Sequence[str]) -> list[str]:
    """Models whose tensors are stored in another type, so that rounding counts as change."""
    base, notes = every[0], []
    for model, label in zip(every[1:], names[1:], strict=True):
        pairs = [(base.kept_dtype(n).name, model.kept_dtype(n).name) for n in common]
        other = [pair for pair in pairs if pair[0] != pair[1]]
        if other:
            notes.append(
                f"{len(other)} of {len(common)} tensors are {other[0][0]} in {names[0]} and "
                f"{other[0][1]} in {label}: rounding counts as change"
            )
    packed = [n for n, m in zip(names, every, strict=True) if is_packed(m)]
    if packed:
        notes.append(f"{', '.join(packed)}: quantized; stored values are compared as they are")
    return notes


class _Together(TensorReader):
    """One tensor of several models, the same rows of all."""

    def __init__(self, readers: Sequence[TensorReader], local: threading.local) -> None:
        self.spec: TensorSpec = readers[0].spec
        self.readers = readers
        double = any(reader.spec.dtype.name == "F64" for reader in readers)
        self._work = np.dtype(np.float64 if double else np.float32)
        self._local = local

    @property
    def passes(self) -> int:  # type: ignore[override]
        """As many as any of them needs."""
        return max(reader.passes for reader in self.readers)

    def observe(self, index: int, rows: Rows) -> None:
        """Let those that have the pass see the chunk."""
        for reader in self.readers:
            if index < reader.passes:
                reader.observe(index, rows)

    def settle(self, index: int) -> None:
        """Finish the pass."""
        for reader in self.readers:
            if index < reader.passes:
                reader.settle(index)

    def gather(self, rows: Rows) -> Array:
        """Decode rows of all: ``(models, elements)``, valid until this thread gathers again.

        float32, or float64 where one of the models is stored so.
        """
        count = rows.size * self.spec.columns
        values = self._buffer("values", len(self.readers) * count, self._work)
        values = values.reshape(len(self.readers), count)
        for reader, target in zip(self.readers, values, strict=True):
            dtype = reader.spec.dtype
            if dtype.storage == self._work:
                reader.read(rows, target)
            else:
                stored = self._buffer("stored", count, dtype.storage)
                reader.read(rows, stored)
                decode(stored, dtype, target)
        return values

    def read(self, rows: Rows, out: Array) -> None:
        """Not that of one tensor; see `gather`."""
        raise NotImplementedError

    def close(self) -> None:
        """Close all."""
        for reader in self.readers:
            reader.close()

    def _buffer(self, role: str, count: int, dtype: np.dtype[np.generic]) -> Array:
        """This thread's own memory, grown where it is too small."""
        held: Array | None = getattr(self._local, role, None)
        size = count * dtype.itemsize
        if held is None or held.nbytes < size:
            held = np.empty(size // 8 + 1, np.float64)
            setattr(self._local, role, held)
        return held.view(np.uint8)[:size].view(dtype)


class _CompareJob(Job):
    """Compares one tensor; chunks are added in their order, whichever is done first."""

    def __init__(self, name: str, reader: _Together, results: dict[str, Sums]) -> None:
        super().__init__(reader)
        self._name = name
        self._together = reader
        self._results = results
        self._parts: dict[int, Sums] = {}

    def finish(self, rows: Rows) -> None:
        values = self._together.gather(rows)
        part = Sums.empty(len(values) - 1)
        compare(values[1:], values[0], part.each, part.pairs, part.common)
        self._parts[rows.start] = part

    def done(self) -> None:
        parts = [self._parts[start] for start in sorted(self._parts)]
        total = Sums.over(len(self._together.readers) - 1, parts)
        elements = self.reader.spec.elements
        self._results[self._name] = Sums(elements, total.each, total.pairs, total.common)

    def input_bytes(self, rows: Rows) -> int:
        """Bytes of all models."""
        width = sum(reader.spec.dtype.itemsize for reader in self._together.readers)
        return rows.size * self.reader.spec.columns * width


def _jobs(
    names: Sequence[str], every: Sequence[Checkpoint], results: dict[str, Sums]
) -> Iterator[Job]:
    local = threading.local()

    def prefetch(name: str) -> None:
        for model in every:
            model.prefetch(name)

    announce(prefetch, names)
    for name in names:
        prefetch(name)
        yield _CompareJob(name, _Together([model.open(name) for model in every], local), results)
