"""What fine-tunes changed in their base, tensor by tensor, in one pass over the weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt

import numpy as np

from mergekit_lite.checkpoint.layers import Layer, map_layers
from mergekit_lite.checkpoint.protocol import Checkpoint, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.cast import decode
from mergekit_lite.kernels.differ import COLUMNS, compare
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.stream import Job, run_jobs

__all__ = ["Diff", "Sums", "TensorDiff", "compare_models", "total"]


@dataclass(frozen=True)
class Sums:
    """Sums over some elements of a base and ``n`` models, from which everything else follows.

    Attributes:
        elements: How many.
        each: ``(n, 5)``, see `mergekit_lite.kernels.differ.COLUMNS`.
        pairs: ``(n, n)``, products of the changes of two models, above the diagonal.
        common: ``(3,)``: squares of the base, elements that two or more changed, in how many of
            these they disagree in sign.
    """

    elements: int
    each: Array
    pairs: Array
    common: Array

    def relative(self, model: int) -> float:
        """Norm of the change, relative to that of the base; NaN where the base is zero."""
        size = self.common[0]
        return sqrt(self.each[model, 0] / size) if size > 0 else nan

    def cosine(self, model: int) -> float:
        """Cosine between the model and the base; NaN where one is zero."""
        product = self.common[0] * self.each[model, 2]
        return float(self.each[model, 1] / sqrt(product)) if product > 0 else nan

    def largest(self, model: int) -> float:
        """Largest change of an element."""
        return float(self.each[model, 3])

    def changed(self, model: int) -> float:
        """Share of the elements that changed."""
        return float(self.each[model, 4] / self.elements) if self.elements else nan

    def agreement(self, first: int, second: int) -> float:
        """Cosine between the changes of two models; NaN where one changed nothing."""
        low, high = sorted((first, second))
        product = self.each[low, 0] * self.each[high, 0]
        return float(self.pairs[low, high] / sqrt(product)) if product > 0 else nan

    @property
    def conflict(self) -> float:
        """Of the elements that two or more models changed, the share in which signs differ."""
        return float(self.common[2] / self.common[1]) if self.common[1] else nan


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
        """What it is called in every layer, or its whole name."""
        name = self.name if self.layer is None else self.layer.rest.lstrip(".")
        return name.removesuffix(".weight")


@dataclass(frozen=True)
class Diff:
    """A comparison.

    Attributes:
        base: How the user named the base.
        models: How the user named the models.
        tensors: Those that all have in one shape, sorted.
        others: Why other tensors were left out, by name.
    """

    base: str
    models: Sequence[str]
    tensors: Sequence[TensorDiff]
    others: Mapping[str, str]

    @property
    def kinds(self) -> dict[str, list[TensorDiff]]:
        """Tensors of the layers by kind, in the order of a layer; others by their names."""
        found: dict[str, list[TensorDiff]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.kind, []).append(tensor)
        return found


def compare_models(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    threads: int,
    progress: Progress,
) -> Diff:
    """Compare models with their base.

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
        raise PackError(
            "the models have no tensor in common",
            "Compare models of one architecture; see: pack inspect",
        )
    layers = map_layers(common, base.config)
    progress.begin("Compare", sum(base.spec(name).nbytes for name in common))
    results: dict[str, Sums] = {}
    run_jobs(_jobs(common, every, results), threads, 256 * 10**6, progress.advance, lambda: None)
    tensors = [
        TensorDiff(name, layers.layers.get(name), base.spec(name).shape, results[name])
        for name in sorted(common, key=lambda n: _order(n, layers.layers.get(n)))
    ]
    return Diff(names[0], names[1:], tensors, others)


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


class _Together(TensorReader):
    """One tensor of several models, each row after row."""

    def __init__(self, readers: Sequence[TensorReader]) -> None:
        self.spec: TensorSpec = readers[0].spec
        self.readers = readers

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

    def read(self, rows: Rows, out: Array) -> None:
        """Decode rows of all: ``out`` is ``(models, elements)`` float32."""
        for i, reader in enumerate(self.readers):
            stored = np.empty(out.shape[1], reader.spec.dtype.storage)
            reader.read(rows, stored)
            decode(stored, reader.spec.dtype, out[i])

    def close(self) -> None:
        """Close all."""
        for reader in self.readers:
            reader.close()


class _CompareJob(Job):
    """Compares one tensor; chunks are added in their order, whichever is done first."""

    def __init__(self, name: str, reader: _Together, results: dict[str, Sums]) -> None:
        super().__init__(reader)
        self._name = name
        self._results = results
        self._parts: dict[int, tuple[Array, Array, Array]] = {}
        self._lock = threading.Lock()
        if not self.chunks:
            results[name] = self._sum()

    def finish(self, rows: Rows) -> None:
        count = rows.size * self.reader.spec.columns
        models = len(self.reader.readers) - 1  # type: ignore[attr-defined]
        values = np.empty((models + 1, count), np.float32)
        self.reader.read(rows, values)
        part = np.zeros((models, COLUMNS)), np.zeros((models, models)), np.zeros(3)
        compare(values[1:], values[0], *part)
        with self._lock:
            self._parts[rows.start] = part

    def done(self) -> None:
        self._results[self._name] = self._sum()

    def _sum(self) -> Sums:
        models = len(self.reader.readers) - 1  # type: ignore[attr-defined]
        every = [self._parts[start] for start in sorted(self._parts)]
        return _added(self.reader.spec.elements, models, every)


def _added(elements: int, models: int, parts: Sequence[tuple[Array, Array, Array]]) -> Sums:
    each, pairs, common = np.zeros((models, COLUMNS)), np.zeros((models, models)), np.zeros(3)
    for own, products, shared in parts:
        largest = np.where(np.isnan(own[:, 3]), nan, np.maximum(each[:, 3], own[:, 3]))
        each += own
        each[:, 3] = largest
        pairs += products
        common += shared
    return Sums(elements, each, pairs, common)


def total(tensors: Sequence[TensorDiff]) -> Sums:
    """The sums of several tensors as one."""
    models = tensors[0].sums.each.shape[0]
    parts = [(t.sums.each, t.sums.pairs, t.sums.common) for t in tensors]
    return _added(sum(t.sums.elements for t in tensors), models, parts)


def _jobs(
    names: Sequence[str], every: Sequence[Checkpoint], results: dict[str, Sums]
) -> Iterator[Job]:
    for name in names:
        for model in every:
            model.prefetch(name)
        yield _CompareJob(name, _Together([model.open(name) for model in every]), results)


def number(value: float) -> float | None:
    """A number for JSON, which has no NaN and no infinity."""
    return value if isfinite(value) else None
