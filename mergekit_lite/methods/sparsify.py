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
"""Elements up to which a tensor, which is then one chunk, is sorted."""

_LARGE = 1 << 18
"""Elements from which a tensor is sampled first."""

_SAMPLE = 700_000
"""Elements of a sample, about; of a large tensor a sixteenth is taken."""

_MOST_BINS = 8
"""Width of a bracket, in steps of 1/128 of the magnitude, beyond which a radix is faster."""


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

    The selection is exact. A large tensor is sampled first; the sample gives a narrow bracket of
    magnitudes, in which every bit pattern is then counted. Where the bracket missed, where the
    work is in float64 or spans the model, a radix selection goes over 16 bits at a time.

    Attributes:
        thresholds: ``(n,)`` of the working type, once all passes are settled; 0 where everything
            is kept, infinity where nothing is.
    """

    def __init__(self, tensor: TensorContext, density: Array) -> None:
        self._tensor = tensor
        self._bits: np.dtype[Any] = np.dtype(f"u{tensor.work.itemsize}")
        self.thresholds = np.zeros(tensor.models, tensor.work)
        self.thresholds[density <= 0] = np.inf
        ranks = np.maximum(1, np.floor(density * tensor.elements)).astype(np.int64)
        undecided = (density > 0) & (density < 1) & (tensor.elements > 0)
        self._ranks = {int(i): int(ranks[i]) for i in np.flatnonzero(undecided)}
        self._prefixes = np.zeros(tensor.models, self._bits)
        self._lows = np.zeros(tensor.models, np.uint32)
        self._widths = np.zeros(tensor.models, np.uint32)
        self._counts: dict[int, Array] = {}
        self._above: dict[int, Array] = {}
        self._steps = self._choose() if self._ranks else []
        self.passes = len(self._steps)

    def _choose(self) -> list[str]:
        """The passes to begin with."""
        tensor = self._tensor
        whole_tensor = tensor.columns > 0
        if whole_tensor and tensor.elements <= _SMALL:
            return ["sort"]
        if whole_tensor and tensor.work == np.float32 and _LARGE <= tensor.elements < 1 << 32:
            return ["sample", "bracket"]
        return self._radix()

    def _radix(self) -> list[str]:
        return [str(level) for level in range(self._tensor.work.itemsize // 2)]

    def observe(self, index: int, chunk: Chunk) -> None:
        """Count the chunk's magnitudes, each thread into counts of its own."""
        step = self._steps[index]
        tile, origin = chunk.scratch.floats[:2]
        if step == "sort":
            self._sort(chunk)
        elif step == "sample":
            counts = self._mine(select.BINS, np.int64)
            stride = max(1, min(16, self._tensor.elements // _SAMPLE))
            select.sample_histogram(chunk.models, chunk.origin, stride, counts, tile, origin)
        elif step == "bracket":
            counts = self._mine(int(self._widths.max()), np.uint32)
            above = self._above.setdefault(
                threading.get_ident(), np.zeros(self._tensor.models, np.int64)
            )
            select.bracket_counts(
                chunk.models, chunk.origin, self._lows, self._widths, counts, above, tile, origin
            )
        else:
            counts = self._mine(select.BINS, np.int64)
            select.histogram(
                chunk.models, chunk.origin, int(step), self._prefixes, counts, tile, origin
            )

    def settle(self, index: int) -> None:
        """Narrow the range of every model that is still open."""
        step = self._steps[index]
        if step == "sort":
            return
        counts = np.asarray(sum(self._counts.values()))
        self._counts.clear()
        if step == "sample":
            self._bracket(counts)
        elif step == "bracket":
            self._close(counts, np.asarray(sum(self._above.values())))
        else:
            self._descend(counts, int(step))

    def _mine(self, width: int, dtype: type[np.generic]) -> Array:
        """The calling thread's counts for this pass, ``(n, width)``."""
        me = threading.get_ident()
        counts = self._counts.get(me)
        if counts is None:
            counts = self._counts[me] = np.zeros((self._tensor.models, width), dtype)
        return counts

    def _sort(self, chunk: Chunk) -> None:
        origin = widened(chunk.origin, self._tensor.work)
        for i, rank in self._ranks.items():
            size = np.abs(widened(chunk.models[i], self._tensor.work) - origin)
            self.thresholds[i] = np.partition(size, size.size - rank)[size.size - rank]

    def _bracket(self, counts: Array) -> None:
        """From a sample to the bits between which the threshold almost surely lies."""
        for i, rank in self._ranks.items():
            sampled = int(counts[i].sum())
            share = rank / self._tensor.elements
            margin = 6.0 * (sampled * share * (1.0 - share)) ** 0.5 + 16.0
            top = select.descend(counts[i], max(1, int(sampled * share - margin)))[0]
            bottom = select.descend(counts[i], min(sampled, int(sampled * share + margin) + 1))[0]
            if top - bottom < _MOST_BINS:
                self._lows[i] = bottom << 16
                self._widths[i] = (top - bottom + 1) << 16
        if not self._widths.any():
            self._steps = [*self._steps[:1], *self._radix()]
            self.passes = len(self._steps)

    def _close(self, counts: Array, above: Array) -> None:
        """From the counts inside the brackets to thresholds; what was missed is done by radix."""
        for i in list(self._ranks):
            within = self._ranks[i] - int(above[i])
            if not 1 <= within <= int(counts[i].sum()):
                continue
            at = select.descend(counts[i], within)[0]
            self.thresholds[i] = (self._lows[i : i + 1] + np.uint32(at)).view(np.float32)[0]
            del self._ranks[i]
        if self._ranks:
            self._steps += self._radix()
            self.passes = len(self._steps)

    def _descend(self, counts: Array, level: int) -> None:
        for i, rank in self._ranks.items():
            key, self._ranks[i] = select.descend(counts[i], rank)
            self._prefixes[i] = (int(self._prefixes[i]) << 16) | int(key)
            if level == self._tensor.work.itemsize // 2 - 1:
                self.thresholds[i] = self._prefixes[i : i + 1].view(self._tensor.work)[0]


class DeltaNorms(Statistic):
    """Per model, the L1 norm of the delta over that of its kept part.

    Runs after another statistic, whose thresholds it needs.

    Attributes:
        ratio: ``(n,)`` of the working type, once settled; 1 where nothing is kept.
    """

    passes = 1

    def __init__(self, tensor: TensorContext, cutoffs: Array) -> None:
        self._cutoffs = cutoffs
        self._partial: dict[bytes, Array] = {}
        self.ratio = np.ones(tensor.models)

    def gather(self, chunk: Chunk, thresholds: Array) -> None:
        """Sum over one chunk."""
        tensor, block = chunk.tensor, chunk.tensor.block
        at = chunk.first // block
        shape = (tensor.models, max(1, -(-tensor.elements // block)), 2)
        # A tensor is told by its keys: of a statistic that spans the model there are many.
        key = tensor.keys.tobytes()
        sums = self._partial.get(key)
        if sums is None:  # another thread may be first, and all write into its array
            sums = self._partial.setdefault(key, np.zeros(shape))
        out = sums[:, at : at - (-chunk.origin.size // block)]
        reduce.delta_magnitudes(
            chunk.models, chunk.origin, thresholds, self._cutoffs, chunk.tensor.keys, chunk.first,
            block, out, chunk.scratch.floats, chunk.scratch.words,
        )  # fmt: skip

    def finish(self) -> None:
        """Add the blocks of all tensors, in an order of their own."""
        if not self._partial:
            return
        blocks = np.concatenate([self._partial[key] for key in sorted(self._partial)], axis=1)
        self._partial.clear()
        for i in range(len(self.ratio)):
            every, kept = reduce.in_order(np.ascontiguousarray(blocks[i]))
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

    @property
    def passes(self) -> int:  # type: ignore[override]
        """Passes of the selection, which may find that it needs more, and one for the norms."""
        return self._top.passes + (1 if self._norms else 0)

    @property
    def thresholds(self) -> Array:
        """``(n,)``, magnitudes below which an element is dropped."""
        return self._top.thresholds

    @property
    def factors(self) -> Array:
        """``(n,)``, what the kept elements are multiplied by."""
        return self._norms.ratio if self._norms else np.ones(len(self._top.thresholds))

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
