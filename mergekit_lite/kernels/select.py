"""The k-th largest magnitude of many deltas, exactly, in memory that does not grow with the tensor.

Radix selection: the bits of a non-negative float order like the float itself, so a histogram of the
highest 16 bits tells which bin holds the k-th largest, a second one of the next 16 bits over that
bin alone tells its value. Two passes for float32, four for float64. Counts do not depend on order,
so the result does not depend on chunks, threads or vector width.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from mergekit_lite.kernels.cast import bits_of, load
from mergekit_lite.kernels.jit import TILE, kernel, overloads

__all__ = [
    "BINS",
    "SAMPLE_GROUP",
    "bracket_counts",
    "descend",
    "histogram",
    "sample_histogram",
]

BINS = 1 << 16
SAMPLE_GROUP = 256
"""Neighbouring elements that a sample takes together."""

_GROUP = 32


def _magnitude_bits(value: Any) -> Any:
    raise NotImplementedError


@overloads(_magnitude_bits)
def _magnitude_bits_impl(value: Any) -> Any:
    if value == numba.float32:

        def single(value: Any) -> Any:
            return bits_of(value) & np.uint32(0x7FFFFFFF)

        return single

    def double(value: Any) -> Any:
        return bits_of(value) & np.uint64(0x7FFFFFFFFFFFFFFF)

    return double


@kernel
def histogram(
    models: Any, base: Any, level: int, prefixes: Any, counts: Any, tile: Any, origin: Any
) -> None:
    """Count the magnitudes of ``models[i] - base`` by 16 of their bits.

    Args:
        models: ``(n, m)``, as stored.
        base: ``(m,)``, as stored.
        level: Which 16 bits, 0 for the highest.
        prefixes: ``(n,)`` uint32 for float32, uint64 for float64; the bits above those 16, which
            a magnitude must have to be counted.
        counts: ``(n, 65536)`` int64, added to.
        tile: ``(1024,)`` of the working type, scratch.
        origin: As ``tile``.
    """
    keys = np.empty(TILE, np.uint16)
    above = np.empty(TILE, prefixes.dtype)
    width = 8 * prefixes.itemsize
    shift = prefixes.dtype.type(width - 16 * (level + 1))
    sixteen = prefixes.dtype.type(16)
    for start in range(0, models.shape[1], TILE):
        count = min(TILE, models.shape[1] - start)
        load(base, start, count, origin)
        for i in range(models.shape[0]):
            load(models[i], start, count, tile)
            row = counts[i]
            for j in range(count):
                bits = _magnitude_bits(tile[j] - origin[j]) >> shift
                keys[j] = np.uint16(bits)
                above[j] = bits >> sixteen
            if level == 0:
                for j in range(count):
                    row[keys[j]] += 1
                continue
            wanted = prefixes[i]
            whole = count // _GROUP * _GROUP
            for group in range(0, whole, _GROUP):
                part = above[group : group + _GROUP]
                hits = np.uint32(0)
                for j in range(_GROUP):
                    hits += np.uint32(part[j] == wanted)
                if hits != np.uint32(0):
                    for j in range(group, group + _GROUP):
                        if above[j] == wanted:
                            row[keys[j]] += 1
            for j in range(whole, count):
                if above[j] == wanted:
                    row[keys[j]] += 1


@kernel
def sample_histogram(
    models: Any, base: Any, stride: int, counts: Any, tile: Any, origin: Any
) -> None:
    """Count the magnitudes of a share of the elements by their highest 16 bits (float32 only).

    Args:
        models: As in `histogram`.
        base: As in `histogram`.
        stride: Takes `SAMPLE_GROUP` elements out of ``stride`` times as many.
        counts: ``(n, 65536)`` int64, added to.
        tile: As in `histogram`.
        origin: As in `histogram`.
    """
    keys = np.empty(SAMPLE_GROUP, np.uint16)
    for start in range(0, models.shape[1], SAMPLE_GROUP * stride):
        count = min(SAMPLE_GROUP, models.shape[1] - start)
        load(base, start, count, origin)
        for i in range(models.shape[0]):
            load(models[i], start, count, tile)
            row = counts[i]
            for j in range(count):
                keys[j] = np.uint16(_magnitude_bits(tile[j] - origin[j]) >> np.uint32(16))
            for j in range(count):
                row[keys[j]] += 1


@kernel
def bracket_counts(
    models: Any,
    base: Any,
    lows: Any,
    widths: Any,
    counts: Any,
    above: Any,
    tile: Any,
    origin: Any,
) -> None:
    """Count every magnitude inside a bracket by itself, and how many lie above it (float32 only).

    Args:
        models: As in `histogram`.
        base: As in `histogram`.
        lows: ``(n,)`` uint32, bits of the smallest magnitude of each bracket.
        widths: ``(n,)`` uint32, how many bit patterns a bracket holds.
        counts: ``(n, widest)`` uint32, added to.
        above: ``(n,)`` int64, added to.
        tile: As in `histogram`.
        origin: As in `histogram`.
    """
    offsets = np.empty(TILE, np.uint32)
    inside = np.empty(TILE, np.uint16)
    for start in range(0, models.shape[1], TILE):
        count = min(TILE, models.shape[1] - start)
        load(base, start, count, origin)
        for i in range(models.shape[0]):
            load(models[i], start, count, tile)
            low = lows[i]
            width = widths[i]
            high = low + width
            row = counts[i]
            over: Any = np.uint32(0)
            for j in range(count):
                bits = _magnitude_bits(tile[j] - origin[j])
                offsets[j] = bits - low
                over += np.uint32(bits >= high)
            above[i] += over
            # Gather the few that are inside without a branch that would be guessed wrong.
            found: Any = 0
            for j in range(count):
                inside[found] = j
                found += np.int64(offsets[j] < width)
            for k in range(found):
                row[offsets[inside[k]]] += np.uint32(1)


@kernel
def descend(counts: Any, rank: int) -> Any:
    """Find the bin that holds the ``rank``-th largest (from 1), and the rank within that bin.

    Args:
        counts: ``(bins,)`` integers, bins of ascending values.
        rank: From 1 to the sum of the counts; beyond it, the lowest bin is returned.
    """
    left = np.int64(rank)
    for at in range(counts.size - 1, 0, -1):
        here = np.int64(counts[at])
        if left <= here:
            return at, left
        left -= here
    return 0, left
