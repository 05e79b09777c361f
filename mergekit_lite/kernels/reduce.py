"""Sums over tensors in float64, in an order that neither chunks, threads nor the machine change.

A tensor is cut into blocks of a fixed number of elements, counted from its first one. Within a
block, eight partial sums take every eighth element; they are added as a tree. The blocks' sums are
added in the order of the blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.cast import load
from mergekit_lite.kernels.jit import TILE, kernel
from mergekit_lite.kernels.random import random_words

__all__ = ["delta_magnitudes", "in_order", "largest_magnitude", "moments"]

_LANES = 8


@kernel
def moments(first: Any, second: Any, block: int, out: Any, scratch: Any) -> None:
    """Sum ``x·y``, ``x·x`` and ``y·y`` over every block.

    Args:
        first: ``(m,)`` as stored, beginning at the start of a block.
        second: As ``first``.
        block: Elements in a block.
        out: ``(ceil(m / block), 3)`` float64, written.
        scratch: ``(2, 1024)`` or more rows of the working type.
    """
    x = scratch[0]
    y = scratch[1]
    dot = np.zeros(_LANES, np.float64)
    left = np.zeros(_LANES, np.float64)
    right = np.zeros(_LANES, np.float64)
    for begin in range(0, first.size, block):
        end = min(begin + block, first.size)
        dot[:] = 0.0
        left[:] = 0.0
        right[:] = 0.0
        for start in range(begin, end, TILE):
            count = min(TILE, end - start)
            load(first, start, count, x)
            load(second, start, count, y)
            for j in range(count, min(TILE, (count + _LANES - 1) // _LANES * _LANES)):
                x[j] = 0
                y[j] = 0
            for j in range(0, count, _LANES):
                for lane in range(_LANES):
                    p = np.float64(x[j + lane])
                    q = np.float64(y[j + lane])
                    dot[lane] += p * q
                    left[lane] += p * p
                    right[lane] += q * q
        row = begin // block
        out[row, 0] = _tree(dot)
        out[row, 1] = _tree(left)
        out[row, 2] = _tree(right)


@kernel
def delta_magnitudes(
    models: Any,
    base: Any,
    thresholds: Any,
    cutoffs: Any,
    keys: Any,
    first: int,
    block: int,
    out: Any,
    scratch: Any,
    words: Any,
) -> None:
    """Sum ``|d|`` over every block, and ``|d|`` of the elements that `fuse.delta_sum` would keep.

    Args:
        models: ``(n, m)`` as stored, beginning at the start of a block.
        base: ``(m,)`` as stored; ``d = models[i] - base``.
        thresholds: As in `fuse.delta_sum`.
        cutoffs: As in `fuse.delta_sum`.
        keys: As in `fuse.delta_sum`.
        first: As in `fuse.delta_sum`.
        block: Elements in a block.
        out: ``(n, ceil(m / block), 2)`` float64, written.
        scratch: ``(2, 1024)`` or more rows of the working type.
        words: Buffer for `random_words`.
    """
    x = scratch[0]
    y = scratch[1]
    every = np.zeros(_LANES, np.float64)
    kept = np.zeros(_LANES, np.float64)
    for i in range(models.shape[0]):
        threshold = thresholds[i]
        for begin in range(0, base.size, block):
            end = min(begin + block, base.size)
            every[:] = 0.0
            kept[:] = 0.0
            for start in range(begin, end, TILE):
                count = min(TILE, end - start)
                load(models[i], start, count, x)
                load(base, start, count, y)
                at = random_words(keys[i], first + start, count, words)
                for j in range(count):
                    size = np.float64(abs(x[j] - y[j]))
                    keep = not size < threshold and np.uint64(words[at + j]) < cutoffs[i]
                    every[j % _LANES] += size
                    kept[j % _LANES] += size if keep else 0.0
            out[i, begin // block, 0] = _tree(every)
            out[i, begin // block, 1] = _tree(kept)


@kernel
def _tree(lanes: Any) -> float:
    return float(
        ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6]))
        + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
    )


@kernel
def in_order(partial: Any) -> Any:
    """Add the rows of a ``(blocks, k)`` float64 array, first to last; returns ``(k,)``."""
    total = np.zeros(partial.shape[1], np.float64)
    for i in range(partial.shape[0]):
        for k in range(partial.shape[1]):
            total[k] += partial[i, k]
    return total


def largest_magnitude(values: Any) -> float:
    """The largest magnitude of float32 values; infinity or NaN if there is one among them.

    Without their sign, the bits of floats are ordered as the floats are, NaN last.
    """
    return float(np.array(_largest_bits(values.view(np.uint32)), np.uint32).view(np.float32))


@kernel
def _largest_bits(bits: Any) -> int:
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return int(largest)
