"""One pass over a chunk of several models: decode, combine, round.

All kernels take the models as one array ``(n, m)`` as stored (see `mergekit_lite.kernels.cast`),
work in the type of their scratch buffers, and write ``(m,)`` as stored.

float32 holds 65536 values for each one of bfloat16, so rounding its result is wrong only where that
lies within a few errors of float32 of the middle between two of them. With weights such as 0.3 this
is not rare: whole multiples of tenths of a unit fall on the middle itself. Those elements, and only
those, are computed again in float64 and rounded to float32, which costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from mergekit_lite.kernels.cast import bits_of, load, store
from mergekit_lite.kernels.jit import TILE, inner, kernel, overloads
from mergekit_lite.kernels.random import random_words

__all__ = ["blend", "count_nonfinite", "delta_sum", "in_doubt", "scaled", "weighted_sum"]


_DOUBT = 16
"""Errors of float32, in units of its last place, within which a middle is in doubt."""

_GROUP = 64


def in_doubt(tile: Any, count: int, out: Any, found: Any) -> int:
    """List the elements of a tile that float32 may round wrongly (only inside kernels).

    Args:
        tile: Results, of the working type.
        count: How many of them.
        out: The array that they will be stored in; its type decides.
        found: ``(1024,)`` uint16, filled with positions in the tile.

    Returns:
        How many there are; always 0 where float32 is not rounded to bfloat16. What lies on the
        middle itself is no doubt: it goes to the even neighbour.
    """
    raise NotImplementedError


@overloads(in_doubt)
def _in_doubt(tile: Any, count: Any, out: Any, found: Any) -> Any:
    if tile.dtype != numba.float32 or out.dtype != numba.uint16:

        def nothing(tile: Any, count: Any, out: Any, found: Any) -> int:
            return 0

        return nothing

    def near_the_middle(tile: Any, count: Any, out: Any, found: Any) -> int:
        number = 0
        low = np.uint32(0x8000 - _DOUBT)
        width = np.uint32(2 * _DOUBT + 1)
        middle = np.uint32(_DOUBT)
        for group in range(0, count, _GROUP):
            part = tile[group : min(group + _GROUP, count)]
            hits = np.uint32(0)
            for j in range(part.size):
                off = (bits_of(part[j]) & np.uint32(0xFFFF)) - low
                hits += np.uint32((off < width) & (off != middle))
            if hits != np.uint32(0):
                for j in range(part.size):
                    off = (bits_of(part[j]) & np.uint32(0xFFFF)) - low
                    if off < width and off != middle:
                        found[number] = group + j
                        number += 1
        return number

    return near_the_middle


@inner
def _as_float64(source: Any, at: int, one: Any) -> float:
    """One stored element as float64; ``one`` is a tile of one element, scratch."""
    load(source, at, 1, one)
    return np.float64(one[0])


@kernel
def weighted_sum(models: Any, weights: Any, divisor: float, out: Any, scratch: Any) -> None:
    """``out = Σ weights[i]·models[i] / divisor``.

    Args:
        models: ``(n, m)``.
        weights: ``(n,)`` float64.
        divisor: float64.
        out: ``(m,)``.
        scratch: ``(2, 1024)`` or more rows of the working type.
    """
    kind = scratch.dtype.type
    found = np.empty(TILE, np.uint16)
    tile = scratch[0]
    total = scratch[1]
    for start in range(0, models.shape[1], TILE):
        count = min(TILE, models.shape[1] - start)
        for i in range(models.shape[0]):
            load(models[i], start, count, tile)
            weight = kind(weights[i])
            if i == 0:
                for j in range(count):
                    total[j] = weight * tile[j]
            else:
                for j in range(count):
                    total[j] += weight * tile[j]
        for j in range(count):
            total[j] /= kind(divisor)
        doubts = in_doubt(total, count, out, found)
        if doubts:
            _sum_again(models, weights, divisor, start, found[:doubts], total)
        store(total, count, out, start)


@kernel
def _sum_again(
    models: Any, weights: Any, divisor: float, start: int, found: Any, total: Any
) -> None:
    """Compute some elements of a `weighted_sum` in float64."""
    one = np.empty(1, total.dtype)
    for j in found:
        exact = 0.0
        for i in range(models.shape[0]):
            exact += weights[i] * _as_float64(models[i], start + j, one)
        total[j] = total.dtype.type(exact / divisor)


@kernel
def delta_sum(
    models: Any,
    base: Any,
    weights: Any,
    factors: Any,
    thresholds: Any,
    cutoffs: Any,
    keys: Any,
    first: int,
    elect: bool,
    normalize: bool,
    scale: float,
    out: Any,
    scratch: Any,
    words: Any,
) -> None:
    """``out = base + scale · Σ weights[i]·sparse(models[i] - base) / divisor``.

    An element of a delta is kept where its magnitude reaches ``thresholds[i]`` and its random word
    is below ``cutoffs[i]``, and is then multiplied by ``factors[i]``. With ``elect``, only weighted
    deltas that have the sign of their sum take part (a sum of zero counts as positive). The
    divisor is the sum of the weights that take part if ``normalize``, else 1.

    Args:
        models: ``(n, m)``.
        base: ``(m,)``.
        weights: ``(n,)`` float64.
        factors: ``(n,)`` float64; what the kept elements are rescaled by.
        thresholds: ``(n,)`` of the working type; 0 keeps all.
        cutoffs: ``(n,)`` uint64; 2^32 keeps all.
        keys: ``(n,)`` uint64, keys of the random streams.
        first: Flat index in the tensor of the first element of the chunk.
        elect: Whether signs are elected.
        normalize: Whether to divide by the sum of weights.
        scale: float64.
        out: ``(m,)``.
        scratch: ``(n + 4, 1024)`` of the working type.
        words: Buffer for `random_words`.
    """
    n = models.shape[0]
    kind = scratch.dtype.type
    zero = kind(0)
    one = kind(1)
    found = np.empty(TILE, np.uint16)
    origin = scratch[n]
    total = scratch[n + 1]
    divisor = scratch[n + 2]
    sign = scratch[n + 3]
    everything = np.uint64(1) << np.uint64(32)
    for start in range(0, models.shape[1], TILE):
        count = min(TILE, models.shape[1] - start)
        load(base, start, count, origin)
        for j in range(count):
            total[j] = zero
        for i in range(n):
            delta = scratch[i]
            load(models[i], start, count, delta)
            threshold = thresholds[i]
            factor = kind(factors[i])
            weight = kind(weights[i])
            for j in range(count):
                value = delta[j] - origin[j]
                delta[j] = value if not abs(value) < threshold else zero
            if cutoffs[i] < everything:
                at = random_words(keys[i], first + start, count, words)
                drawn = words[at : at + count]
                cutoff = np.uint32(cutoffs[i])
                for j in range(count):
                    delta[j] = delta[j] * factor if drawn[j] < cutoff else zero
            elif factor != one:
                for j in range(count):
                    delta[j] *= factor
            for j in range(count):
                delta[j] *= weight
                total[j] += delta[j]
        if elect:
            for j in range(count):
                sign[j] = one if total[j] >= zero else -one
                total[j] -= total[j]  # zero, or NaN where the sum is not finite
                divisor[j] = zero
            for i in range(n):
                delta = scratch[i]
                weight = kind(weights[i])
                for j in range(count):
                    agrees = delta[j] * sign[j] > zero
                    total[j] += delta[j] if agrees else zero
                    divisor[j] += weight if agrees else zero
            if normalize:
                for j in range(count):
                    total[j] /= divisor[j] if divisor[j] != zero else one
        elif normalize:
            whole = zero
            for i in range(n):
                whole += kind(weights[i])
            for j in range(count):
                total[j] /= whole
        for j in range(count):
            total[j] = origin[j] + kind(scale) * total[j]
        doubts = in_doubt(total, count, out, found)
        if doubts:
            _deltas_again(
                models, base, weights, factors, scratch, start, found[:doubts], elect, normalize,
                scale, total,
            )  # fmt: skip
        store(total, count, out, start)


@kernel
def _deltas_again(
    models: Any,
    base: Any,
    weights: Any,
    factors: Any,
    deltas: Any,
    start: int,
    found: Any,
    elect: bool,
    normalize: bool,
    scale: float,
    total: Any,
) -> None:
    """Compute some elements of a `delta_sum` in float64; ``deltas[i, j]`` tells what was kept."""
    single = np.empty(1, total.dtype)
    for j in found:
        origin = _as_float64(base, start + j, single)
        merged = _exact_delta(
            models, weights, factors, deltas, j, start + j, origin, elect, normalize, single
        )
        total[j] = total.dtype.type(origin + scale * merged)


@inner
def _exact_delta(
    models: Any,
    weights: Any,
    factors: Any,
    deltas: Any,
    j: int,
    at: int,
    origin: float,
    elect: bool,
    normalize: bool,
    single: Any,
) -> float:
    """The merged delta of one element in float64; ``deltas[i, j]`` tells what was kept."""
    n = models.shape[0]
    total = 0.0
    whole = 0.0
    for i in range(n):
        whole += weights[i]
        if deltas[i, j] != 0:
            total += weights[i] * factors[i] * (_as_float64(models[i], at, single) - origin)
    if not elect:
        return total / whole if normalize else total
    positive = total >= 0.0
    total = 0.0
    whole = 0.0
    for i in range(n):
        if deltas[i, j] != 0:
            value = weights[i] * factors[i] * (_as_float64(models[i], at, single) - origin)
            if value != 0.0 and (value > 0.0) == positive:
                total += value
                whole += weights[i]
    return total / whole if normalize and whole != 0.0 else total


@kernel
def blend(first: Any, second: Any, a: Any, b: Any, group: int, out: Any, scratch: Any) -> None:
    """``out = a·first + b·second``, with a pair of factors for every ``group`` elements.

    Args:
        first: ``(m,)``.
        second: ``(m,)``.
        a: ``(ceil(m / group),)`` float64.
        b: As ``a``.
        group: Elements that share their factors.
        out: ``(m,)``.
        scratch: ``(2, 1024)`` or more rows of the working type.
    """
    kind = scratch.dtype.type
    found = np.empty(TILE, np.uint16)
    x = scratch[0]
    y = scratch[1]
    for begin in range(0, first.size, group):
        end = min(begin + group, first.size)
        left = kind(a[begin // group])
        right = kind(b[begin // group])
        for start in range(begin, end, TILE):
            count = min(TILE, end - start)
            load(first, start, count, x)
            load(second, start, count, y)
            for j in range(count):
                x[j] = left * x[j] + right * y[j]
            doubts = in_doubt(x, count, out, found)
            if doubts:
                _blend_again(
                    first, second, a[begin // group], b[begin // group], start, found[:doubts], x
                )
            store(x, count, out, start)


@kernel
def _blend_again(
    first: Any, second: Any, a: float, b: float, start: int, found: Any, total: Any
) -> None:
    """Compute some elements of a `blend` in float64."""
    one = np.empty(1, total.dtype)
    for j in found:
        exact = a * _as_float64(first, start + j, one) + b * _as_float64(second, start + j, one)
        total[j] = total.dtype.type(exact)


@kernel
def scaled(model: Any, factor: Any, out: Any, scratch: Any) -> None:
    """``out = factor·model``; arguments as in `weighted_sum`."""
    tile = scratch[0]
    for start in range(0, model.size, TILE):
        count = min(TILE, model.size - start)
        load(model, start, count, tile)
        for j in range(count):
            tile[j] *= scratch.dtype.type(factor)
        store(tile, count, out, start)


@kernel
def count_nonfinite(values: Any, scratch: Any) -> int:
    """Count the elements of a stored array that are NaN or infinite."""
    tile = scratch[0]
    found = 0
    for start in range(0, values.size, TILE):
        count = min(TILE, values.size - start)
        load(values, start, count, tile)
        for j in range(count):
            found += int(tile[j] - tile[j] != 0)
    return found
