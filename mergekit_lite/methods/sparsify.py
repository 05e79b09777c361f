"""Statistics of deltas: the magnitude that a given share of them reaches, and their L1 norms."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels import reduce, select
from mergekit_lite.kernels.cast import widened
from mergekit_lite.methods.base import Chunk, Statistic, TensorContext

__all__ = ["EVERYTHING", "Sparsity", "TopShare", "cutoffs_of", "everything"]

EVERYTHING = 1 << 32
"""The cutoff below which every random word lies."""

_SMALL = 1 << 15


def cutoffs_of(density: Array) -> Array:
    """Cutoffs below which a random word lies with probability ``density``; uint64, ``(n,)``."""
    return np.round(density * EVERYTHING).astype(np.uint64)


def everything(models: int) -> Array:
    """Cutoffs that keep every element; uint64, ``(models,)``."""
    return np.full(models, EVERYTHING, np.uint64)


class TopShare(Statistic):
    """Per model, the magnitude of the k-th largest delta, ``k = floor(density · elements)``.

    Elements equal to it are all kept, as in the reference code of the TIES paper, so that the
    result does not depend on an order among equals. A density above 0 keeps at least one element.

    Attributes:
        thresholds: ``(n,)`` of the working type, once all passes are settled; 0 where everything
            is kept, infinity where nothing is.
    """

    def __init__(self, tensor: TensorContext, density: Array) -> None:
        self._work = tensor.work
        self._bits: np.dtype[Any] = np.dtype(f"u{tensor.work.itemsize}")
        self.thresholds = np.zeros(tensor.models, tensor.work)
        self.thresholds[density <= 0] = np.inf
        ranks = np.maximum(1, np.floor(density * tensor.elements)).astype(np.int64)
        self._ranks = {i: int(ranks[i]) for i in np.flatnonzero((density > 0) & (density < 1))}
        self._prefixes = np.zeros(tensor.models, self._bits)
        self._counts: dict[int, Array] = {}
        self._small = tensor.elements <= _SMALL and tensor.columns > 0
        levels = tensor.work.itemsize // 2
        self.passes = 0 if not self._ranks or not tensor.elements else 1 if self._small else levels

    def observe(self, index: int, chunk: Chunk) -> None:
        """Count the chunk's magnitudes, each thread into counts of its own."""
        if self._small:
            self._select(chunk)
            return
        me = threading.get_ident()
        counts = self._counts.get(me)
        if counts is None:
            counts = self._counts[me] = np.zeros((len(self.thresholds), select.BINS), np.int64)
        tile, origin = chunk.scratch.floats[:2]
        select.histogram(chunk.models, chunk.origin, index, self._prefixes, counts, tile, origin)

    def _select(self, chunk: Chunk) -> None:
        origin = widened(chunk.origin, self._work)
        for i, rank in self._ranks.items():
            size = np.abs(widened(chunk.models[i], self._work) - origin)
            self.thresholds[i] = np.partition(size, size.size - rank)[size.size - rank]

    def settle(self, index: int) -> None:
        """Narrow every model's range to one of its bins."""
        if self._small:
            return
        counts = np.sum(list(self._counts.values()), axis=0)
        self._counts.clear()
        for i, rank in self._ranks.items():
            key, self._ranks[i] = select.descend(counts[i], rank)
            self._prefixes[i] = (int(self._prefixes[i]) << 16) | key
        if index == self.passes - 1:
            for i in self._ranks:
                self.thresholds[i] = self._prefixes[i : i + 1].view(self._work)[0]


class DeltaNorms(Statistic):
    """Per model, the L1 norm of the delta over that of its kept part.

    Runs after another statistic, whose thresholds it needs.

    Attributes:
        ratio: ``(n,)`` of the working type, once settled; 1 where nothing is kept.
    """

    passes = 1

    def __init__(self, tensor: TensorContext, cutoffs: Array) -> None:
        self._cutoffs = cutoffs
        blocks = max(1, -(-tensor.elements // tensor.block))
        self._partial = np.zeros((tensor.models, blocks, 2), np.float64)
        self.ratio = np.ones(tensor.models, tensor.work)

    def gather(self, chunk: Chunk, thresholds: Array) -> None:
        """Sum over one chunk."""
        block = chunk.tensor.block
        at = chunk.first // block
        out = self._partial[:, at : at - (-chunk.origin.size // block)]
        reduce.delta_magnitudes(
            chunk.models, chunk.origin, thresholds, self._cutoffs, chunk.tensor.keys, chunk.first,
            block, out, chunk.scratch.floats, chunk.scratch.words,
        )  # fmt: skip

    def finish(self) -> None:
        """Add the blocks."""
        for i in range(len(self.ratio)):
            every, kept = reduce.in_order(self._partial[i])
            self.ratio[i] = every / kept if kept > 0 else 1.0


class Sparsity(Statistic):
    """Thresholds and rescaling factors of the deltas of one tensor.

    Args:
        tensor: The tensor.
        density: ``(n,)`` share of elements to keep by magnitude; None keeps all.
        cutoffs: ``(n,)`` uint64, random cutoffs.
        norms: Whether to match the L1 norm of what is kept to that of the whole.
    """

    def __init__(
        self, tensor: TensorContext, density: Array | None, cutoffs: Array, norms: bool
    ) -> None:
        self._top = TopShare(tensor, np.ones(tensor.models) if density is None else density)
        self._norms = DeltaNorms(tensor, cutoffs) if norms else None
        self.passes = self._top.passes + (1 if norms else 0)

    @property
    def thresholds(self) -> Array:
        """``(n,)``, magnitudes below which an element is dropped."""
        return self._top.thresholds

    @property
    def factors(self) -> Array:
        """``(n,)``, what the kept elements are multiplied by."""
        return self._norms.ratio if self._norms else np.ones_like(self._top.thresholds)

    def observe(self, index: int, chunk: Chunk) -> None:
        """See one chunk."""
        if index < self._top.passes:
            self._top.observe(index, chunk)
        elif self._norms:
            self._norms.gather(chunk, self._top.thresholds)

    def settle(self, index: int) -> None:
        """Finish a pass."""
        if index < self._top.passes:
            self._top.settle(index)
        elif self._norms:
            self._norms.finish()
