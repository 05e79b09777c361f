"""One pass over a chunk of several models: decode, combine, round.

All kernels take the models as one array ``(n, m)`` as stored (see `mergekit_lite.kernels.cast`),
work in the type of their scratch buffers, and write ``(m,)`` as stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.cast import load, store
from mergekit_lite.kernels.jit import TILE, kernel
from mergekit_lite.kernels.random import random_words

__all__ = ["blend", "count_nonfinite", "delta_sum", "scaled", "weighted_sum"]


@kernel
def weighted_sum(models: Any, weights: Any, divisor: Any, out: Any, scratch: Any) -> None:
    """``out = Σ weights[i]·models[i] / divisor``.

    Args:
        models: ``(n, m)``.
        weights: ``(n,)`` of the working type.
        divisor: Scalar of the working type.
        out: ``(m,)``.
        scratch: ``(2, 1024)`` or more rows of the working type.
    """
    tile = scratch[0]
    total = scratch[1]
    for start in range(0, models.shape[1], TILE):
        count = min(TILE, models.shape[1] - start)
        for i in range(models.shape[0]):
            load(models[i], start, count, tile)
            weight = weights[i]
            if i == 0:
                for j in range(count):
                    total[j] = weight * tile[j]
            else:
                for j in range(count):
                    total[j] += weight * tile[j]
        for j in range(count):
            total[j] /= divisor
        store(total, count, out, start)


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
    scale: Any,
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
        weights: ``(n,)`` of the working type.
        factors: ``(n,)`` of the working type; what the kept elements are rescaled by.
        thresholds: ``(n,)`` of the working type; 0 keeps all.
        cutoffs: ``(n,)`` uint64; 2^32 keeps all.
        keys: ``(n,)`` uint64, keys of the random streams.
        first: Flat index in the tensor of the first element of the chunk.
        elect: Whether signs are elected.
        normalize: Whether to divide by the sum of weights.
        scale: Scalar of the working type.
        out: ``(m,)``.
        scratch: ``(n + 4, 1024)`` of the working type.
        words: Buffer for `random_words`.
    """
    n = models.shape[0]
    zero = scale * scratch.dtype.type(0)
    one = zero + scratch.dtype.type(1)
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
            factor = factors[i]
            weight = weights[i]
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
                weight = weights[i]
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
                whole += weights[i]
            for j in range(count):
                total[j] /= whole
        for j in range(count):
            total[j] = origin[j] + scale * total[j]
        store(total, count, out, start)


@kernel
def blend(first: Any, second: Any, a: Any, b: Any, group: int, out: Any, scratch: Any) -> None:
    """``out = a·first + b·second``, with a pair of factors for every ``group`` elements.

    Args:
        first: ``(m,)``.
        second: ``(m,)``.
        a: ``(ceil(m / group),)`` of the working type.
        b: As ``a``.
        group: Elements that share their factors.
        out: ``(m,)``.
        scratch: ``(2, 1024)`` or more rows of the working type.
    """
    x = scratch[0]
    y = scratch[1]
    for begin in range(0, first.size, group):
        end = min(begin + group, first.size)
        left = a[begin // group]
        right = b[begin // group]
        for start in range(begin, end, TILE):
            count = min(TILE, end - start)
            load(first, start, count, x)
            load(second, start, count, y)
            for j in range(count):
                x[j] = left * x[j] + right * y[j]
            store(x, count, out, start)


@kernel
def scaled(model: Any, factor: Any, out: Any, scratch: Any) -> None:
    """``out = factor·model``; arguments as in `weighted_sum`."""
    tile = scratch[0]
    for start in range(0, model.size, TILE):
        count = min(TILE, model.size - start)
        load(model, start, count, tile)
        for j in range(count):
            tile[j] *= factor
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
