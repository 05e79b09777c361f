"""One pass over a base and some fine-tunes: sizes, cosines and signs of what they changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.jit import TILE, inner, kernel

__all__ = ["COLUMNS", "SHARED", "compare"]

COLUMNS = 6
"""Numbers per model: Σd², Σx·b, Σx², largest |d|, elements that changed, elements not finite."""

SHARED = 4
"""Numbers of all together: Σb², elements that two or more changed, in how many of those they
disagree in sign, elements of the base that are not finite."""

_LANES = 8


@kernel
def compare(models: Any, base: Any, each: Any, pairs: Any, common: Any) -> None:
    """Compare some elements of models with those of their base; ``d = model - base``.

    Every sum has eight partial sums in float64 that take every eighth element, from the first one
    to the last, and are added as a tree; so the same elements always give the same bits.

    Args:
        models: ``(n, m)`` float32 or float64.
        base: ``(m,)`` of the same type.
        each: ``(n, 6)`` float64, written; see `COLUMNS`. The largest is NaN where a change is.
        pairs: ``(n, n)`` float64, ``Σ dᵢ·dⱼ`` is written for ``i < j``.
        common: ``(4,)`` float64, written; see `SHARED`.
    """
    n = models.shape[0]
    b = np.zeros(TILE, np.float64)
    x = np.zeros(TILE, np.float64)
    deltas = np.zeros((n, TILE), np.float64)
    signs = np.zeros((3, TILE), np.int32)
    lanes = np.zeros((n, 3, _LANES), np.float64)
    products = np.zeros((n, n, _LANES), np.float64)
    squares = np.zeros(_LANES, np.float64)
    each[:] = 0.0
    common[:] = 0.0
    for start in range(0, base.size, TILE):
        count = min(TILE, base.size - start)
        _fill(base[start : start + count], b)
        _dot(b, b, squares)
        common[3] += _not_finite(b)
        signs[:] = 0
        for i in range(n):
            d = deltas[i]
            _fill(models[i, start : start + count], x)
            for j in range(TILE):
                d[j] = x[j] - b[j]
            _dot(d, d, lanes[i, 0])
            _dot(x, b, lanes[i, 1])
            _dot(x, x, lanes[i, 2])
            each[i, 3] = _largest(d, each[i, 3])
            each[i, 4] += _count_signs(d, signs)
            each[i, 5] += _not_finite(x)
        for i in range(n):
            for k in range(i + 1, n):
                _dot(deltas[i], deltas[k], products[i, k])
        if n > 1:
            _count_conflicts(signs, common)
    common[0] = _tree(squares)
    for i in range(n):
        for k in range(3):
            each[i, k] = _tree(lanes[i, k])
        for k in range(i + 1, n):
            pairs[i, k] = _tree(products[i, k])


@inner
def _fill(source: Any, tile: Any) -> None:
    """Copy into a tile; what is left of it becomes zero, which adds nothing to any sum."""
    for j in range(source.size):
        tile[j] = source[j]
    for j in range(source.size, TILE):
        tile[j] = 0.0


@inner
def _dot(first: Any, second: Any, lanes: Any) -> None:
    a0, a1, a2, a3 = lanes[0], lanes[1], lanes[2], lanes[3]
    a4, a5, a6, a7 = lanes[4], lanes[5], lanes[6], lanes[7]
    for j in range(0, TILE, _LANES):
        a0 += first[j] * second[j]
        a1 += first[j + 1] * second[j + 1]
        a2 += first[j + 2] * second[j + 2]
        a3 += first[j + 3] * second[j + 3]
        a4 += first[j + 4] * second[j + 4]
        a5 += first[j + 5] * second[j + 5]
        a6 += first[j + 6] * second[j + 6]
        a7 += first[j + 7] * second[j + 7]
    lanes[0], lanes[1], lanes[2], lanes[3] = a0, a1, a2, a3
    lanes[4], lanes[5], lanes[6], lanes[7] = a4, a5, a6, a7


@inner
def _tree(lanes: Any) -> Any:
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + (
        (lanes[1] + lanes[5]) + (lanes[3] + lanes[7])
    )


@inner
def _largest(delta: Any, largest: Any) -> Any:
    broken = 0
    for j in range(TILE):
        size = abs(delta[j])
        largest = max(largest, size)
        broken += 1 if size != size else 0
    return np.nan if broken else largest


@inner
def _not_finite(tile: Any) -> Any:
    count = 0
    for j in range(TILE):
        count += 1 if tile[j] - tile[j] != 0.0 else 0
    return count


@inner
def _count_signs(delta: Any, signs: Any) -> Any:
    """Note who went up, who went down, and how many did; returns how many elements changed."""
    up, down, moved = signs[0], signs[1], signs[2]
    changed = 0
    for j in range(TILE):
        above = 1 if delta[j] > 0.0 else 0
        below = 1 if delta[j] < 0.0 else 0
        up[j] |= above
        down[j] |= below
        moved[j] += above + below
        changed += 1 if delta[j] != 0.0 else 0
    return changed


@inner
def _count_conflicts(signs: Any, common: Any) -> None:
    up, down, moved = signs[0], signs[1], signs[2]
    several = 0
    against = 0
    for j in range(TILE):
        several += 1 if moved[j] > 1 else 0
        against += up[j] & down[j]
    common[1] += several
    common[2] += against
