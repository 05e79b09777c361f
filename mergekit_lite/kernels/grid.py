"""Grids of whole numbers: weights as ``scale · (code − zero)``, their search, rounding to them.

A group of weights shares a scale and a zero point. Of several first scales each is tried: weights
are rounded to codes, and given the codes the best scale follows by weighted least squares, with its
error. A symmetric grid has its zero in the middle, and its scale may be negative, so that the one
code more on the lower side serves whichever side of the weights is longer.

`settle` is the inner part of GPTQ (Frantar et al., arXiv 2210.17323) in the form of QuIP's LDLQ,
to which it is equal (Chee et al., arXiv 2307.13304, theorem 6): a column is rounded after the
errors of the columns before it were added by the factor U of ``H = (U + 1) D (U + 1)ᵀ``.

Matrices are laid out with the columns of the weights as rows, so that the inner loops run over
`LANES` rows of the weights side by side: they fill vectors, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.blocks.half import rounded
from mergekit_lite.kernels.cast import bits_of, float_of
from mergekit_lite.kernels.jit import inner, kernel

__all__ = ["LANES", "NF4", "dequantize", "fit", "nearest", "round_to", "settle"]

LANES = 32
"""Rows of weights that are computed side by side."""

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
"""The 16 values of NormalFloat (Dettmers et al., arXiv 2305.14314, appendix E)."""

_MAGIC = np.float32(12582912.0)  # adding it rounds to a whole number, to nearest even
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TINY = np.float32(2.0**-24)
_POLISH = 2
_NEAR = 8


@inner
def _stored(value: Any, digits: int) -> Any:
    """A scale as a file holds it: 10 digits for float16, 7 for bfloat16, 23 for float32."""
    if digits == 10:
        found = rounded(np.float32(value))
    elif digits == 7:
        bits = bits_of(np.float32(value))
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        found = float_of((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000))
    else:
        found = np.float32(value)
    if abs(found) < _TINY:
        found = _TINY
    return found


@inner
def _sums(x: Any, h: Any, speed: Any, low: Any, high: Any, a: Any, b: Any) -> None:
    """Σ h·c·x and Σ h·c² of a group, c being x divided by the scale, rounded and cut off."""
    for lane in range(LANES):
        a[lane] = _ZERO
        b[lane] = _ZERO
    for j in range(x.shape[0]):
        row = x[j]
        weight = h[j]
        for lane in range(LANES):
            c = min(max((row[lane] * speed[lane] + _MAGIC) - _MAGIC, low[lane]), high[lane])
            p = weight * c
            a[lane] += p * row[lane]
            b[lane] += p * c


@inner
def _keep_better(low: Any, sums: Any, best: Any) -> None:
    """Keep, lane by lane, the scale that least squares gives where it explains more."""
    a, b = sums[0], sums[1]
    for lane in range(LANES):
        if b[lane] > _ZERO:
            gain = a[lane] / b[lane] * a[lane]
            if gain > best[0, lane]:
                best[0, lane] = gain
                best[1, lane] = a[lane] / b[lane]
                best[2, lane] = low[lane]


@inner
def _search(x: Any, h: Any, top: Any, symmetric: bool, least: Any, steps: int, digits: int,
            work: Any, scale: Any, low: Any) -> None:  # fmt: skip
    """Find the scale and the lowest value (minus the zero point) of a group.

    Args:
        x: ``(group, LANES)`` weights.
        h: ``(group,)`` their importance.
        top: Largest code.
        symmetric: Whether the zero point is the middle.
        least: Smallest zero point that is allowed.
        steps: First scales that are tried; 0 takes the range of the weights as it is.
        digits: See `_stored`.
        work: ``(10, LANES)`` scratch.
        scale: ``(LANES,)``, written.
        low: ``(LANES,)``, written.
    """
    lo, hi, speed, least_code, most_code = work[0], work[1], work[2], work[3], work[4]
    best = work[5:8]
    sums = work[8:10]
    middle = np.float32((top + _ONE) * np.float32(0.5))
    for lane in range(LANES):
        lo[lane] = _ZERO
        hi[lane] = _ZERO
    for j in range(x.shape[0]):
        row = x[j]
        for lane in range(LANES):
            lo[lane] = min(lo[lane], row[lane])
            hi[lane] = max(hi[lane], row[lane])
    for lane in range(LANES):
        best[0, lane] = _ZERO
        if symmetric:
            best[1, lane] = max(hi[lane], -lo[lane]) / (middle - np.float32(0.5))
            best[2, lane] = -middle
        else:
            best[1, lane] = (hi[lane] - lo[lane]) / top
            best[2, lane] = _ZERO
            if best[1, lane] > _ZERO:
                zero = (-lo[lane] / best[1, lane] + _MAGIC) - _MAGIC
                best[2, lane] = -min(max(zero, least), top)
    for step in range(steps):
        share = _ONE - np.float32(step) * np.float32(0.5) / np.float32(steps)
        for variant in range(2 if symmetric else 3):
            for lane in range(LANES):
                if symmetric:
                    most = max(hi[lane], -lo[lane]) * share
                    first = most / middle if variant == 0 else -most / middle
                    least_code[lane] = -middle
                else:
                    first = (hi[lane] - lo[lane]) * share / top
                    zero = _ZERO
                    if first > _ZERO:
                        zero = (-lo[lane] * share / first + _MAGIC) - _MAGIC
                    zero += np.float32(variant - 1)
                    least_code[lane] = -min(max(zero, least), top)
                most_code[lane] = least_code[lane] + top
                speed[lane] = _ONE / first if abs(first) > _TINY else _ZERO
            _sums(x, h, speed, least_code, most_code, sums[0], sums[1])
            _keep_better(least_code, sums, best)
    for _ in range(_POLISH if steps else 0):
        for lane in range(LANES):
            least_code[lane] = best[2, lane]
            most_code[lane] = least_code[lane] + top
            speed[lane] = _ONE / best[1, lane] if abs(best[1, lane]) > _TINY else _ZERO
        _sums(x, h, speed, least_code, most_code, sums[0], sums[1])
        _keep_better(least_code, sums, best)
    for lane in range(LANES):
        scale[lane] = _stored(best[1, lane], digits)
        low[lane] = best[2, lane]


@inner
def _take(w: Any, first: int, count: int, lane0: int, lanes: int, tile: Any) -> None:
    """Copy a tile of weights; lanes beyond the last row are zero."""
    for j in range(count):
        row = w[first + j]
        for lane in range(lanes):
            tile[j, lane] = row[lane0 + lane]
        for lane in range(lanes, LANES):
            tile[j, lane] = _ZERO


@kernel
def fit(w: Any, h: Any, group: int, top: float, symmetric: bool, least: float, steps: int,
        digits: int, scales: Any, lows: Any, begin: int, end: int) -> None:  # fmt: skip
    """Find scales of groups of columns that follow one another.

    Args:
        w: ``(columns, rows)`` float32.
        h: ``(columns,)`` float32, importance.
        group: Columns of a group; divides the columns.
        top: Largest code.
        symmetric: Whether zero points are the middle.
        least: Smallest zero point that is allowed.
        steps: First scales that are tried; 0 takes the range as it is.
        digits: Binary digits of a stored scale.
        scales: ``(groups, rows)`` float32, written.
        lows: ``(groups, rows)`` float32, minus the zero points, written.
        begin: First row.
        end: One past the last.
    """
    tile = np.empty((group, LANES), np.float32)
    work = np.empty((10, LANES), np.float32)
    scale = np.empty(LANES, np.float32)
    low = np.empty(LANES, np.float32)
    highest, smallest = np.float32(top), np.float32(least)
    for lane0 in range(begin, end, LANES):
        lanes = min(LANES, end - lane0)
        for g in range(scales.shape[0]):
            _take(w, g * group, group, lane0, lanes, tile)
            _search(tile, h[g * group : (g + 1) * group], highest, symmetric, smallest, steps,
                    digits, work, scale, low)  # fmt: skip
            for lane in range(lanes):
                scales[g, lane0 + lane] = scale[lane]
                lows[g, lane0 + lane] = low[lane]


@kernel
def round_to(w: Any, group_of: Any, scales: Any, lows: Any, top: float, codes: Any, begin: int,
             end: int) -> None:  # fmt: skip
    """Round weights to given grids.

    Args:
        w: ``(columns, rows)`` float32.
        group_of: ``(columns,)`` int32.
        scales: ``(groups, rows)`` float32.
        lows: ``(groups, rows)`` float32.
        top: Largest code.
        codes: ``(columns, rows)`` uint8, written.
        begin: First row.
        end: One past the last.
    """
    highest = np.float32(top)
    for j in range(w.shape[0]):
        row, scale, low, out = w[j], scales[group_of[j]], lows[group_of[j]], codes[j]
        for r in range(begin, end):
            c = (row[r] / scale[r] + _MAGIC) - _MAGIC
            out[r] = np.uint8(min(max(c - low[r], _ZERO), highest))


@inner
def _spread(tile: Any, u: Any, recent: Any, first: int, near: int, count: int) -> None:
    """Add what the last columns lost to all columns behind them.

    Args:
        tile: ``(count, LANES)``, changed.
        u: ``(count, count)``.
        recent: ``(_NEAR, LANES)`` errors.
        first: The first of these columns.
        near: One past the last of them.
        count: Of all.
    """
    e0, e1, e2, e3 = recent[0], recent[1], recent[2], recent[3]
    e4, e5, e6, e7 = recent[4], recent[5], recent[6], recent[7]
    for k in range(near, count):
        target = tile[k]
        u0, u1, u2, u3 = u[first, k], u[first + 1, k], u[first + 2, k], u[first + 3, k]
        u4, u5, u6, u7 = u[first + 4, k], u[first + 5, k], u[first + 6, k], u[first + 7, k]
        for lane in range(LANES):
            target[lane] += ((u0 * e0[lane] + u1 * e1[lane]) + (u2 * e2[lane] + u3 * e3[lane])) + (
                (u4 * e4[lane] + u5 * e5[lane]) + (u6 * e6[lane] + u7 * e7[lane])
            )


@kernel
def settle(w: Any, original: Any, u: Any, group_of: Any, searched: bool, h: Any, top: float,
           symmetric: bool, least: float, steps: int, digits: int, scales: Any, lows: Any,
           codes: Any, errors: Any, begin: int, end: int) -> None:  # fmt: skip
    """Round a block of columns one after the other, each with the errors of those before it.

    Args:
        w: ``(columns, rows)`` float32, with the errors of all earlier blocks added; a multiple of
            8 columns, in which groups that are searched for lie wholly.
        original: ``(columns, rows)`` float32, without.
        u: ``(columns, columns)`` float32, the block's part of U above its diagonal.
        group_of: ``(columns,)`` int32.
        searched: Whether a group's grid is found when its first column is reached.
        h: ``(columns,)`` float32, importance for that.
        top: Largest code.
        symmetric: Whether zero points are the middle.
        least: Smallest zero point that is allowed.
        steps: See `fit`.
        digits: See `fit`.
        scales: ``(groups, rows)`` float32, read or written.
        lows: ``(groups, rows)`` float32, read or written.
        codes: ``(columns, rows)`` uint8, written.
        errors: ``(columns, rows)`` float32, written: what each column lost.
        begin: First row.
        end: One past the last.
    """
    count = w.shape[0]
    tile = np.empty((count, LANES), np.float32)
    work = np.empty((10, LANES), np.float32)
    scale = np.empty(LANES, np.float32)
    low = np.empty(LANES, np.float32)
    recent = np.empty((_NEAR, LANES), np.float32)
    highest, smallest = np.float32(top), np.float32(least)
    for lane0 in range(begin, end, LANES):
        lanes = min(LANES, end - lane0)
        _take(w, 0, count, lane0, lanes, tile)
        group = -1
        for j in range(count):
            if group_of[j] != group:
                group = group_of[j]
                if searched:
                    size = 1
                    while j + size < count and group_of[j + size] == group:
                        size += 1
                    _search(tile[j : j + size], h[j : j + size], highest, symmetric,
                            smallest, steps, digits, work, scale, low)  # fmt: skip
                    for lane in range(lanes):
                        scales[group, lane0 + lane] = scale[lane]
                        lows[group, lane0 + lane] = low[lane]
                else:
                    for lane in range(LANES):
                        scale[lane] = scales[group, lane0 + lane] if lane < lanes else _ONE
                        low[lane] = lows[group, lane0 + lane] if lane < lanes else _ZERO
            row, whole, lost, error = tile[j], original[j], errors[j], recent[j % _NEAR]
            for lane in range(lanes):
                c = (row[lane] / scale[lane] + _MAGIC) - _MAGIC
                c = min(max(c, low[lane]), low[lane] + highest)
                codes[j, lane0 + lane] = np.uint8(c - low[lane])
                error[lane] = whole[lane0 + lane] - c * scale[lane]
                lost[lane0 + lane] = error[lane]
            for lane in range(lanes, LANES):
                error[lane] = _ZERO
            # Columns nearby at once; those behind them when all of these are known.
            near = min(j - j % _NEAR + _NEAR, count)
            for k in range(j + 1, near):
                share = u[j, k]
                target = tile[k]
                for lane in range(LANES):
                    target[lane] += share * error[lane]
            if j + 1 == near:
                _spread(tile, u, recent, near - _NEAR, near, count)


@kernel
def dequantize(codes: Any, scales: Any, zeros: Any, group_of: Any, out: Any, begin: int,
               end: int) -> None:  # fmt: skip
    """Weights that codes stand for.

    Args:
        codes: ``(columns, rows)`` uint8.
        scales: ``(groups, rows)`` float32.
        zeros: ``(groups, rows)`` uint8.
        group_of: ``(columns,)`` int32.
        out: ``(columns, rows)`` float32, written.
        begin: First row.
        end: One past the last.
    """
    for j in range(codes.shape[0]):
        row, scale, zero, target = codes[j], scales[group_of[j]], zeros[group_of[j]], out[j]
        for r in range(begin, end):
            target[r] = np.float32(np.int32(row[r]) - np.int32(zero[r])) * scale[r]


@kernel
def nearest(w: Any, table: Any, group: int, scales: Any, codes: Any, begin: int,
            end: int) -> None:  # fmt: skip
    """Round weights to the nearest of the values of a table, times the largest of their group.

    Args:
        w: ``(columns, rows)`` float32.
        table: ``(16,)`` float32, rising, from -1 to 1.
        group: Columns of a group; divides the columns.
        scales: ``(groups, rows)`` float32, written.
        codes: ``(columns, rows)`` uint8, written.
        begin: First row.
        end: One past the last.
    """
    middles = (table[1:] + table[:-1]) * np.float32(0.5)
    for g in range(scales.shape[0]):
        scale = scales[g]
        for r in range(begin, end):
            scale[r] = _ZERO
        for j in range(g * group, (g + 1) * group):
            row = w[j]
            for r in range(begin, end):
                scale[r] = max(scale[r], abs(row[r]))
        for j in range(g * group, (g + 1) * group):
            row, out = w[j], codes[j]
            for r in range(begin, end):
                share = row[r] / scale[r] if scale[r] > _ZERO else _ZERO
                code = 0
                for step in (8, 4, 2, 1):
                    if share > middles[code + step - 1]:
                        code += step
                out[r] = np.uint8(code)
