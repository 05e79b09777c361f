"""The search for scales: blocks of a row are cut into groups, each with a scale of few bits.

A group's value is ``d·q − m`` with a whole q from 0 to a top and m ≥ 0 (affine), or ``d·q`` with q
from −top to top − 1 (symmetric). A first scale puts the group's extremes at the ends. Then the
scale is varied; for each, weights are rounded to codes, and given the codes the best scale and
minimum follow by weighted least squares, with their error, from five sums. The best is polished by
rounding and solving once more. Then the scales themselves are rounded to few bits over a block that
shares one float16: around the nearest codes neighbours are tried, each with the error that weights
really have with the stored numbers; and the shared float16 numbers are solved for once more.

Least squares for the scales given the codes is what llama.cpp's quantizers do as well (k-quants,
ggml-quants.c); here it minimises the error itself, weighted by the importance alone.

Everything is laid out with `LANES` blocks side by side, element by element, so that the inner loops
run over blocks: they fill vectors, and every sum has a fixed order of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.blocks.half import from_half, to_half
from mergekit_lite.kernels.jit import inner

__all__ = [
    "BLOCK", "LANES", "affine", "affine_group", "gather", "round_group", "symmetric",
    "symmetric_group",
]  # fmt: skip

BLOCK = 256
"""Elements that share a float16 scale."""

LANES = 32
"""Blocks that are computed side by side."""

_MAGIC = np.float32(12582912.0)  # adding it rounds to a whole number, to nearest even
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@inner
def gather(values: Any, importance: Any, first: int, count: int, x: Any, w: Any) -> None:
    """Lay blocks side by side.

    Args:
        values: ``(blocks, 256)`` float32.
        importance: ``(blocks of a row, 256)`` float32, or ``(0, 256)`` for none.
        first: First block.
        count: Number of blocks, at most `LANES`; lanes beyond are filled with zeros.
        x: ``(256, LANES)``, written.
        w: ``(256, LANES)``, written if there is importance.
    """
    columns = importance.shape[0]
    for lane in range(LANES):
        if lane < count:
            row = values[first + lane]
            for j in range(BLOCK):
                x[j, lane] = row[j]
            if columns:
                weights = importance[(first + lane) % columns]
                for j in range(BLOCK):
                    w[j, lane] = weights[j]
        else:
            for j in range(BLOCK):
                x[j, lane] = _ZERO
            if columns:
                for j in range(BLOCK):
                    w[j, lane] = _ZERO


@inner
def _code(value: Any, low: Any, high: Any) -> Any:
    """The nearest whole number within a range, as float32."""
    return min(max((value + _MAGIC) - _MAGIC, low), high)


@inner
def _sums(x: Any, w: Any, weighted: bool, speed: Any, shift: Any, low: Any, high: Any,
          s: Any) -> None:  # fmt: skip
    """Sums over a group, given how it is rounded: Σwq, Σwq², Σwqx in ``s[0..2]``."""
    s0, s1, s2 = s[0], s[1], s[2]
    for lane in range(LANES):
        s0[lane] = _ZERO
        s1[lane] = _ZERO
        s2[lane] = _ZERO
    for j in range(0, x.shape[0], 4):
        xa, xb, xc, xd = x[j], x[j + 1], x[j + 2], x[j + 3]
        if weighted:
            wa, wb, wc, wd = w[j], w[j + 1], w[j + 2], w[j + 3]
            for lane in range(LANES):
                f, t = speed[lane], shift[lane]
                qa = _code(xa[lane] * f + t, low, high)
                qb = _code(xb[lane] * f + t, low, high)
                qc = _code(xc[lane] * f + t, low, high)
                qd = _code(xd[lane] * f + t, low, high)
                pa, pb, pc, pd = wa[lane] * qa, wb[lane] * qb, wc[lane] * qc, wd[lane] * qd
                s0[lane] += (pa + pb) + (pc + pd)
                s1[lane] += (pa * qa + pb * qb) + (pc * qc + pd * qd)
                s2[lane] += (pa * xa[lane] + pb * xb[lane]) + (pc * xc[lane] + pd * xd[lane])
        else:
            for lane in range(LANES):
                f, t = speed[lane], shift[lane]
                qa = _code(xa[lane] * f + t, low, high)
                qb = _code(xb[lane] * f + t, low, high)
                qc = _code(xc[lane] * f + t, low, high)
                qd = _code(xd[lane] * f + t, low, high)
                s0[lane] += (qa + qb) + (qc + qd)
                s1[lane] += (qa * qa + qb * qb) + (qc * qc + qd * qd)
                s2[lane] += (qa * xa[lane] + qb * xb[lane]) + (qc * xc[lane] + qd * xd[lane])


@inner
def _totals(x: Any, w: Any, weighted: bool, s: Any) -> None:
    """Σw, Σwx, Σwx², smallest and largest of a group in ``s[3..7]``."""
    count, first, second, least, most = s[3], s[4], s[5], s[6], s[7]
    for lane in range(LANES):
        count[lane] = _ZERO
        first[lane] = _ZERO
        second[lane] = _ZERO
        least[lane] = x[0, lane]
        most[lane] = x[0, lane]
    for j in range(x.shape[0]):
        row = x[j]
        if weighted:
            weights = w[j]
            for lane in range(LANES):
                p = weights[lane] * row[lane]
                count[lane] += weights[lane]
                first[lane] += p
                second[lane] += p * row[lane]
                least[lane] = min(least[lane], row[lane])
                most[lane] = max(most[lane], row[lane])
        else:
            for lane in range(LANES):
                count[lane] += _ONE
                first[lane] += row[lane]
                second[lane] += row[lane] * row[lane]
                least[lane] = min(least[lane], row[lane])
                most[lane] = max(most[lane], row[lane])


@inner
def _keep_affine(s: Any, free: bool, best: Any) -> None:
    """Solve for scale and minimum from the sums; keep them where the error is the least so far.

    ``best`` holds the error, the scale and the minimum, which may be negative if it is ``free``.
    """
    l1, l2, lx, count, first = s[0], s[1], s[2], s[3], s[4]
    error, scale, minimum = best[0], best[1], best[2]
    for lane in range(LANES):
        det = count[lane] * l2[lane] - l1[lane] * l1[lane]
        safe = det if det > _ZERO else _ONE
        d = (count[lane] * lx[lane] - first[lane] * l1[lane]) / safe
        m = (l1[lane] * lx[lane] - l2[lane] * first[lane]) / safe
        square = l2[lane] if l2[lane] > _ZERO else _ONE
        alone = ((m < _ZERO) & (not free)) | (det <= _ZERO)
        d = lx[lane] / square if alone else d
        m = _ZERO if alone else m
        e = (d * d * l2[lane] - np.float32(2.0) * d * lx[lane]) + (
            m * m * count[lane] + np.float32(2.0) * m * (first[lane] - d * l1[lane])
        )
        better = (d > _ZERO) & (e < error[lane])
        error[lane] = e if better else error[lane]
        scale[lane] = d if better else scale[lane]
        minimum[lane] = m if better else minimum[lane]


@inner
def affine_group(
    x: Any, w: Any, weighted: bool, top: int, steps: Any, free: bool, s: Any, best: Any
) -> None:
    """Scale and minimum of one group of each lane; in ``best[1]`` and ``best[2]``.

    Args:
        x: ``(elements, LANES)`` float32.
        w: As ``x``: importance.
        weighted: Whether to look at it.
        top: Largest code of an element.
        steps: By how much the largest element is put beyond its code, ``(k,)`` float32.
        free: Whether the minimum may be negative, so that all values are above zero.
        s: ``(10, LANES)`` float32, written.
        best: ``(3, LANES)`` float32, written.
    """
    _totals(x, w, weighted, s)
    least, most = s[6], s[7]
    low, high = _ZERO, np.float32(top)
    speed, shift = s[8], s[9]
    error, scale, minimum = best[0], best[1], best[2]
    for lane in range(LANES):
        least[lane] = least[lane] if free else min(least[lane], _ZERO)
        width = most[lane] - least[lane]
        error[lane] = np.float32(np.inf)
        scale[lane] = width / high if width > _ZERO else _ZERO
        minimum[lane] = -least[lane]
    for step in steps:
        for lane in range(LANES):
            width = most[lane] - least[lane]
            f = (high + step) / width if width > _ZERO else _ZERO
            speed[lane] = f
            shift[lane] = -least[lane] * f
        _sums(x, w, weighted, speed, shift, low, high, s)
        _keep_affine(s, free, best)
    for _ in range(2):
        for lane in range(LANES):
            f = _ONE / scale[lane] if scale[lane] > _ZERO else _ZERO
            speed[lane] = f
            shift[lane] = minimum[lane] * f
        _sums(x, w, weighted, speed, shift, low, high, s)
        _keep_affine(s, free, best)


@inner
def _error(x: Any, w: Any, weighted: bool, d: Any, m: Any, low: Any, high: Any, s: Any) -> None:
    """Error of a group with given scale and minimum, in ``s[0]``."""
    error, speed, shift = s[0], s[8], s[9]
    for lane in range(LANES):
        f = _ONE / d[lane] if d[lane] != _ZERO else _ZERO
        speed[lane] = f
        shift[lane] = m[lane] * f
        error[lane] = _ZERO
    for j in range(0, x.shape[0], 4):
        xa, xb, xc, xd = x[j], x[j + 1], x[j + 2], x[j + 3]
        if weighted:
            wa, wb, wc, wd = w[j], w[j + 1], w[j + 2], w[j + 3]
            for lane in range(LANES):
                f, t = speed[lane], shift[lane]
                a = (d[lane] * _code(xa[lane] * f + t, low, high) - m[lane]) - xa[lane]
                b = (d[lane] * _code(xb[lane] * f + t, low, high) - m[lane]) - xb[lane]
                c = (d[lane] * _code(xc[lane] * f + t, low, high) - m[lane]) - xc[lane]
                e = (d[lane] * _code(xd[lane] * f + t, low, high) - m[lane]) - xd[lane]
                error[lane] += (wa[lane] * a * a + wb[lane] * b * b) + (
                    wc[lane] * c * c + wd[lane] * e * e
                )
        else:
            for lane in range(LANES):
                f, t = speed[lane], shift[lane]
                a = (d[lane] * _code(xa[lane] * f + t, low, high) - m[lane]) - xa[lane]
                b = (d[lane] * _code(xb[lane] * f + t, low, high) - m[lane]) - xb[lane]
                c = (d[lane] * _code(xc[lane] * f + t, low, high) - m[lane]) - xc[lane]
                e = (d[lane] * _code(xd[lane] * f + t, low, high) - m[lane]) - xd[lane]
                error[lane] += (a * a + b * b) + (c * c + e * e)


@inner
def affine(
    x: Any, w: Any, weighted: bool, size: int, top: int, most: int, steps: Any, out: Any, q: Any,
    work: Any,
) -> None:  # fmt: skip
    """Codes of blocks whose groups have a scale and a minimum.

    Args:
        x: ``(256, LANES)`` float32.
        w: As ``x``: importance.
        weighted: Whether to look at it.
        size: Elements of a group.
        top: Largest code of an element.
        most: Largest code of a scale and of a minimum.
        steps: By how much the largest element is put beyond its code, ``(k,)`` float32.
        out: ``(2 + 2·groups, LANES)`` float32, written: the bits of the two float16 numbers as
            numbers, then codes of the groups' scales, then of their minima.
        q: ``(256, LANES)`` uint8, written: codes of elements.
        work: ``(32 + 6·groups, LANES)`` float32.
    """
    groups = BLOCK // size
    s, best, trial = work[:10], work[10:13], work[13:16]
    scales, minima = work[16 : 16 + groups], work[16 + groups : 16 + 2 * groups]
    errors = work[16 + 2 * groups : 16 + 3 * groups]
    whole = work[16 + 3 * groups : 24 + 3 * groups]
    largest, lowest = whole[0], whole[1]
    for lane in range(LANES):
        largest[lane] = _ZERO
        lowest[lane] = _ZERO
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        affine_group(x[part], w[part], weighted, top, steps, False, s, best)
        for lane in range(LANES):
            scales[g, lane] = best[1, lane]
            minima[g, lane] = best[2, lane]
            largest[lane] = max(largest[lane], best[1, lane])
            lowest[lane] = max(lowest[lane], best[2, lane])
    d, m = whole[2], whole[3]
    for lane in range(LANES):
        d[lane] = from_half(to_half(largest[lane] / np.float32(most)))
        m[lane] = from_half(to_half(lowest[lane] / np.float32(most)))
    codes, offsets = out[2 : 2 + groups], out[2 + groups : 2 + 2 * groups]
    _choose(x, w, weighted, size, top, most, scales, minima, d, m, codes, offsets, errors, work)
    _solve_shared(x, w, weighted, size, top, most, codes, offsets, errors, d, m, work)
    high = np.float32(top)
    for lane in range(LANES):
        out[0, lane] = np.float32(to_half(d[lane]))
        out[1, lane] = np.float32(to_half(m[lane]))
    for g in range(groups):
        real, offset = trial[0], trial[1]
        for lane in range(LANES):
            real[lane] = d[lane] * codes[g, lane]
            offset[lane] = m[lane] * offsets[g, lane]
        round_group(x[g * size : (g + 1) * size], real, offset, _ZERO, high, s, q[g * size :])


@inner
def round_group(x: Any, d: Any, m: Any, low: Any, high: Any, s: Any, q: Any) -> None:
    """Codes of a group, counted from the lowest one."""
    speed, shift = s[8], s[9]
    for lane in range(LANES):
        f = _ONE / d[lane] if d[lane] != _ZERO else _ZERO
        speed[lane] = f
        shift[lane] = m[lane] * f
    for j in range(x.shape[0]):
        row, codes = x[j], q[j]
        for lane in range(LANES):
            codes[lane] = np.uint8(_code(row[lane] * speed[lane] + shift[lane], low, high) - low)


@inner
def _choose(
    x: Any, w: Any, weighted: bool, size: int, top: int, most: int, scales: Any, minima: Any,
    d: Any, m: Any, codes: Any, offsets: Any, errors: Any, work: Any,
) -> None:  # fmt: skip
    """Codes of scales and minima: the nearest ones, or neighbours of them with a smaller error."""
    s, trial = work[:10], work[13:16]
    real, offset = trial[0], trial[1]
    high, last = np.float32(top), np.float32(most)
    for g in range(scales.shape[0]):
        part = slice(g * size, (g + 1) * size)
        for lane in range(LANES):
            errors[g, lane] = np.float32(np.inf)
        for step in range(-1, 2):
            for side in range(-1, 2):
                for lane in range(LANES):
                    f = _ONE / d[lane] if d[lane] > _ZERO else _ZERO
                    t = _ONE / m[lane] if m[lane] > _ZERO else _ZERO
                    code = _code(scales[g, lane] * f + np.float32(step), _ZERO, last)
                    below = _code(minima[g, lane] * t + np.float32(side), _ZERO, last)
                    real[lane] = d[lane] * code
                    offset[lane] = m[lane] * below
                _error(x[part], w[part], weighted, real, offset, _ZERO, high, s)
                for lane in range(LANES):
                    f = _ONE / d[lane] if d[lane] > _ZERO else _ZERO
                    t = _ONE / m[lane] if m[lane] > _ZERO else _ZERO
                    code = _code(scales[g, lane] * f + np.float32(step), _ZERO, last)
                    below = _code(minima[g, lane] * t + np.float32(side), _ZERO, last)
                    better = s[0, lane] < errors[g, lane]
                    errors[g, lane] = s[0, lane] if better else errors[g, lane]
                    codes[g, lane] = code if better else codes[g, lane]
                    offsets[g, lane] = below if better else offsets[g, lane]


@inner
def _solve_shared(
    x: Any, w: Any, weighted: bool, size: int, top: int, most: int, codes: Any, offsets: Any,
    errors: Any, d: Any, m: Any, work: Any,
) -> None:  # fmt: skip
    """Given all codes, the best shared scale and minimum; kept where the error is smaller."""
    groups = codes.shape[0]
    s, trial = work[:10], work[13:16]
    real, offset = trial[0], trial[1]
    whole = work[16 + 3 * groups : 24 + 3 * groups]
    aa, ab, bb, ax, bx = whole[0], whole[1], whole[4], whole[5], whole[6]
    high = np.float32(top)
    for lane in range(LANES):
        aa[lane] = _ZERO
        ab[lane] = _ZERO
        bb[lane] = _ZERO
        ax[lane] = _ZERO
        bx[lane] = _ZERO
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        for lane in range(LANES):
            scale = d[lane] * codes[g, lane]
            f = _ONE / scale if scale > _ZERO else _ZERO
            s[8, lane] = f
            s[9, lane] = m[lane] * offsets[g, lane] * f
        _totals(x[part], w[part], weighted, s)
        _sums(x[part], w[part], weighted, s[8], s[9], _ZERO, high, s)
        for lane in range(LANES):
            a, b = codes[g, lane], offsets[g, lane]
            aa[lane] += a * a * s[1, lane]
            ab[lane] += a * b * s[0, lane]
            bb[lane] += b * b * s[3, lane]
            ax[lane] += a * s[2, lane]
            bx[lane] += b * s[4, lane]
    for lane in range(LANES):
        # Minimise Σ w·(D·a·q − M·b − x)² over D and M.
        det = aa[lane] * bb[lane] - ab[lane] * ab[lane]
        good = det > np.float32(1e-6) * aa[lane] * bb[lane]
        safe = det if good else _ONE
        scale = (ax[lane] * bb[lane] - ab[lane] * bx[lane]) / safe
        below = (ab[lane] * ax[lane] - aa[lane] * bx[lane]) / safe
        alone = ax[lane] / aa[lane] if aa[lane] > _ZERO else _ZERO
        use = good & (scale > _ZERO) & (below >= _ZERO)
        bare = (bb[lane] == _ZERO) & (alone > _ZERO)
        real[lane] = scale if use else alone if bare else d[lane]
        offset[lane] = below if use else m[lane]
        aa[lane] = from_half(to_half(real[lane]))
        ab[lane] = from_half(to_half(offset[lane]))
        ax[lane] = _ZERO
        bx[lane] = _ZERO
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        for lane in range(LANES):
            real[lane] = aa[lane] * codes[g, lane]
            offset[lane] = ab[lane] * offsets[g, lane]
        _error(x[part], w[part], weighted, real, offset, _ZERO, high, s)
        for lane in range(LANES):
            ax[lane] += s[0, lane]
            bx[lane] += errors[g, lane]
    for lane in range(LANES):
        better = ax[lane] < bx[lane]
        d[lane] = aa[lane] if better else d[lane]
        m[lane] = ab[lane] if better else m[lane]


@inner
def _keep_symmetric(s: Any, best: Any) -> None:
    """Solve for the scale from the sums; keep it where the error is the least so far."""
    l2, lx = s[1], s[2]
    error, scale = best[0], best[1]
    for lane in range(LANES):
        square = l2[lane] if l2[lane] > _ZERO else _ONE
        d = lx[lane] / square
        e = -d * lx[lane]
        better = e < error[lane]
        error[lane] = e if better else error[lane]
        scale[lane] = d if better else scale[lane]


@inner
def symmetric(
    x: Any, w: Any, weighted: bool, size: int, top: int, most: int, steps: Any, turned: bool,
    out: Any, q: Any, work: Any,
) -> None:  # fmt: skip
    """Codes of blocks whose groups have a scale alone.

    Args:
        x: ``(256, LANES)`` float32.
        w: As ``x``: importance.
        weighted: Whether to look at it.
        size: Elements of a group.
        top: An element's codes go from −top to top − 1.
        most: A scale's codes go from −most to most − 1.
        steps: By how much the largest element is put beyond its code, ``(k,)`` float32.
        turned: Whether the largest element is also tried at the end that has a code less.
        out: ``(1 + groups, LANES)`` float32, written: the bits of the float16 number as a number,
            then codes of the groups' scales.
        q: ``(256, LANES)`` uint8, written: codes of elements, counted from −top.
        work: ``(32 + 6·groups, LANES)`` float32.
    """
    groups = BLOCK // size
    s, best = work[:10], work[10:13]
    scales = work[16 : 16 + groups]
    whole = work[16 + 3 * groups : 24 + 3 * groups]
    largest, d, real, none = whole[0], whole[1], whole[2], whole[3]
    low, high = np.float32(-top), np.float32(top - 1)
    for lane in range(LANES):
        largest[lane] = _ZERO
        none[lane] = _ZERO
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        symmetric_group(x[part], w[part], weighted, low, high, steps, turned, s, best)
        for lane in range(LANES):
            scale = best[1, lane]
            scales[g, lane] = scale
            largest[lane] = scale if abs(scale) > abs(largest[lane]) else largest[lane]
    codes = out[1 : 1 + groups]
    for lane in range(LANES):
        d[lane] = from_half(to_half(largest[lane] / np.float32(-most)))
    errors = work[16 + groups : 16 + 2 * groups]
    _choose_scales(x, w, weighted, size, top, most, scales, d, codes, errors, work)
    _solve_scale(x, w, weighted, size, top, codes, errors, d, work)
    for lane in range(LANES):
        out[0, lane] = np.float32(to_half(d[lane]))
    for g in range(groups):
        for lane in range(LANES):
            real[lane] = d[lane] * codes[g, lane]
        round_group(x[g * size : (g + 1) * size], real, none, low, high, s, q[g * size :])


@inner
def symmetric_group(
    x: Any, w: Any, weighted: bool, low: Any, high: Any, steps: Any, turned: bool, s: Any,
    best: Any,
) -> None:  # fmt: skip
    """Scale of one group of each lane; in ``best[1]``; see `symmetric` and `affine_group`."""
    _totals(x, w, weighted, s)
    speed, shift = s[8], s[9]
    error, scale = best[0], best[1]
    for lane in range(LANES):
        error[lane] = _ZERO
        scale[lane] = _ZERO
        shift[lane] = _ZERO
    for side in range(2 if turned else 1):
        end = high if side else low
        for step in steps:
            for lane in range(LANES):
                extreme = s[7, lane] if s[7, lane] > -s[6, lane] else s[6, lane]
                reach = end + step if side else end - step
                speed[lane] = reach / extreme if extreme != _ZERO else _ZERO
            _sums(x, w, weighted, speed, shift, low, high, s)
            _keep_symmetric(s, best)
    for _ in range(2):
        for lane in range(LANES):
            speed[lane] = _ONE / scale[lane] if scale[lane] != _ZERO else _ZERO
        _sums(x, w, weighted, speed, shift, low, high, s)
        _keep_symmetric(s, best)


@inner
def _choose_scales(
    x: Any, w: Any, weighted: bool, size: int, top: int, most: int, scales: Any, d: Any,
    codes: Any, errors: Any, work: Any,
) -> None:  # fmt: skip
    """Codes of scales: the nearest ones, or neighbours of them with a smaller error."""
    groups = scales.shape[0]
    s = work[:10]
    whole = work[16 + 3 * groups : 24 + 3 * groups]
    real, none, code = whole[2], whole[3], whole[4]
    low, high = np.float32(-top), np.float32(top - 1)
    first, last = np.float32(-most), np.float32(most - 1)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        for lane in range(LANES):
            errors[g, lane] = np.float32(np.inf)
        for step in range(-1, 2):
            for lane in range(LANES):
                f = _ONE / d[lane] if d[lane] != _ZERO else _ZERO
                code[lane] = _code(scales[g, lane] * f + np.float32(step), first, last)
                real[lane] = d[lane] * code[lane]
            _error(x[part], w[part], weighted, real, none, low, high, s)
            for lane in range(LANES):
                better = s[0, lane] < errors[g, lane]
                errors[g, lane] = s[0, lane] if better else errors[g, lane]
                codes[g, lane] = code[lane] if better else codes[g, lane]


@inner
def _solve_scale(
    x: Any, w: Any, weighted: bool, size: int, top: int, codes: Any, errors: Any, d: Any,
    work: Any,
) -> None:  # fmt: skip
    """Given all codes, the best shared scale; kept where the error is smaller."""
    groups = codes.shape[0]
    s = work[:10]
    whole = work[16 + 3 * groups : 24 + 3 * groups]
    real, none, aa, ax, before, after = whole[2], whole[3], whole[4], whole[5], whole[6], whole[7]
    low, high = np.float32(-top), np.float32(top - 1)
    for lane in range(LANES):
        aa[lane] = _ZERO
        ax[lane] = _ZERO
        before[lane] = _ZERO
        after[lane] = _ZERO
        s[9, lane] = _ZERO
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        for lane in range(LANES):
            scale = d[lane] * codes[g, lane]
            s[8, lane] = _ONE / scale if scale != _ZERO else _ZERO
        _sums(x[part], w[part], weighted, s[8], s[9], low, high, s)
        for lane in range(LANES):
            a = codes[g, lane]
            aa[lane] += a * a * s[1, lane]
            ax[lane] += a * s[2, lane]
            before[lane] += errors[g, lane]
    for lane in range(LANES):
        solved = ax[lane] / aa[lane] if aa[lane] > _ZERO else d[lane]
        aa[lane] = from_half(to_half(solved))
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        for lane in range(LANES):
            real[lane] = aa[lane] * codes[g, lane]
        _error(x[part], w[part], weighted, real, none, low, high, s)
        for lane in range(LANES):
            after[lane] += s[0, lane]
    for lane in range(LANES):
        d[lane] = aa[lane] if after[lane] < before[lane] else d[lane]
