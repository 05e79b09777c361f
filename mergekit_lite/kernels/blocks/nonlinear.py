"""IQ4_NL and IQ4_XS: four bits name one of 16 values that lie closer together near zero.

Source of layouts and of the values: ``block_iq4_nl``, ``block_iq4_xs`` and ``kvalues_iq4nl`` of
ggml. The search is that of `mergekit_lite.kernels.blocks.search` for groups with a scale alone,
with these values in the place of whole numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.blocks.half import from_half, to_half
from mergekit_lite.kernels.blocks.search import BLOCK, LANES, gather
from mergekit_lite.kernels.jit import inner, kernel

__all__ = ["VALUES", "decode_iq4_nl", "decode_iq4_xs", "encode_iq4_nl", "encode_iq4_xs"]

VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""What the 16 codes stand for, times a group's scale."""

_MIDDLES = (VALUES[1:] + VALUES[:-1]) / np.float32(2)
_GROUP = 32
_GROUPS = BLOCK // _GROUP
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_STEPS = np.linspace(-7.0, 7.0, 15).astype(np.float32)
_XS_BYTES = 136
_NL_BYTES = 18


def encode_iq4_nl(values: Array, importance: Array | None, out: Array) -> None:
    """4.5 bits, a float16 scale for each 32: see `mergekit_lite.kernels.blocks.types.Encode`."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    blocks = -(-flat.size // BLOCK)
    padded: Array = flat
    if flat.size % BLOCK:
        padded = np.zeros(blocks * BLOCK, np.float32)
        padded[: flat.size] = flat
    weights: Array = np.empty((0, BLOCK), np.float32)
    if importance is not None:
        # Rows need not be whole blocks of 256, so every block gets weights of its own.
        weights = np.zeros(blocks * BLOCK, np.float32)
        weights[: flat.size] = np.tile(importance, values.shape[0])
        weights = weights.reshape(-1, BLOCK)
    stored = np.empty((blocks * _GROUPS, _NL_BYTES), np.uint8)
    _encode_iq4_nl(padded.reshape(-1, BLOCK), weights, _STEPS, stored)
    out.reshape(-1, _NL_BYTES)[:] = stored[: flat.size // _GROUP]


def encode_iq4_xs(values: Array, importance: Array | None, out: Array) -> None:
    """4.25 bits, a scale of 6 bits for each 32: see `mergekit_lite.kernels.blocks.types.Encode`."""
    weights = np.empty((0, BLOCK), np.float32)
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32).reshape(-1, BLOCK)
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK)
    _encode_iq4_xs(blocks, weights, _STEPS, out.reshape(-1, _XS_BYTES))


@inner
def _nearest(t: Any) -> Any:
    """The value that is nearest to a number."""
    v = VALUES[0]
    for k in range(15):
        v = VALUES[k + 1] if t > _MIDDLES[k] else v
    return v


@inner
def _sums(x: Any, w: Any, weighted: bool, speed: Any, s: Any) -> None:
    """Σwv² and Σwvx over a group in ``s[0]`` and ``s[1]``, v being the nearest values."""
    square, product = s[0], s[1]
    for lane in range(LANES):
        square[lane] = _ZERO
        product[lane] = _ZERO
    for j in range(_GROUP):
        row = x[j]
        if weighted:
            weights = w[j]
            for lane in range(LANES):
                v = _nearest(row[lane] * speed[lane])
                p = weights[lane] * v
                square[lane] += p * v
                product[lane] += p * row[lane]
        else:
            for lane in range(LANES):
                v = _nearest(row[lane] * speed[lane])
                square[lane] += v * v
                product[lane] += v * row[lane]


@inner
def _error(x: Any, w: Any, weighted: bool, d: Any, s: Any) -> None:
    """Error of a group with a given scale, in ``s[0]``."""
    error, speed = s[0], s[3]
    for lane in range(LANES):
        speed[lane] = _ONE / d[lane] if d[lane] != _ZERO else _ZERO
        error[lane] = _ZERO
    for j in range(_GROUP):
        row = x[j]
        if weighted:
            weights = w[j]
            for lane in range(LANES):
                e = d[lane] * _nearest(row[lane] * speed[lane]) - row[lane]
                error[lane] += weights[lane] * e * e
        else:
            for lane in range(LANES):
                e = d[lane] * _nearest(row[lane] * speed[lane]) - row[lane]
                error[lane] += e * e


@inner
def _keep(s: Any, best: Any, scale: Any) -> None:
    """Solve for the scale; keep it where the error is the least so far."""
    for lane in range(LANES):
        square = s[0, lane] if s[0, lane] > _ZERO else _ONE
        d = s[1, lane] / square
        e = -d * s[1, lane]
        better = e < best[lane]
        best[lane] = e if better else best[lane]
        scale[lane] = d if better else scale[lane]


@inner
def _group(x: Any, w: Any, weighted: bool, steps: Any, s: Any, scale: Any) -> None:
    """The best scale of one group of each lane."""
    extreme, best, speed = s[2], s[4], s[3]
    for lane in range(LANES):
        extreme[lane] = _ZERO
        best[lane] = _ZERO
        scale[lane] = _ZERO
    for j in range(_GROUP):
        row = x[j]
        for lane in range(LANES):
            larger = abs(row[lane]) > abs(extreme[lane])
            extreme[lane] = row[lane] if larger else extreme[lane]
    for end in range(2):
        # Either end of the values may hold the extreme element.
        reach = VALUES[15] if end else VALUES[0]
        for step in steps:
            for lane in range(LANES):
                speed[lane] = (reach + step) / extreme[lane] if extreme[lane] != _ZERO else _ZERO
            _sums(x, w, weighted, speed, s)
            _keep(s, best, scale)
    for _ in range(2):
        for lane in range(LANES):
            speed[lane] = _ONE / scale[lane] if scale[lane] != _ZERO else _ZERO
        _sums(x, w, weighted, speed, s)
        _keep(s, best, scale)


@inner
def _codes(x: Any, d: Any, q: Any) -> None:
    """The codes of a group's elements."""
    for lane in range(LANES):
        f = _ONE / d[lane] if d[lane] != _ZERO else _ZERO
        for j in range(_GROUP):
            t = x[j, lane] * f
            code = 0
            for k in range(15):
                code += t > _MIDDLES[k]
            q[j, lane] = code


@kernel
def _encode_iq4_nl(values: Any, importance: Any, steps: Any, out: Any) -> None:
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    q, s = np.empty((_GROUP, LANES), np.uint8), np.empty((6, LANES), np.float32)
    scale = np.empty(LANES, np.float32)
    weighted = importance.shape[0] > 0
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        gather(values, importance, first, count, x, w)
        for g in range(_GROUPS):
            part = slice(g * _GROUP, (g + 1) * _GROUP)
            _group(x[part], w[part], weighted, steps, s, scale)
            for lane in range(LANES):
                scale[lane] = from_half(to_half(scale[lane]))
            _codes(x[part], scale, q)
            for lane in range(count):
                block = out[(first + lane) * _GROUPS + g]
                bits = to_half(scale[lane])
                block[0], block[1] = np.uint8(bits & np.uint32(255)), np.uint8(bits >> np.uint32(8))
                for j in range(16):
                    block[2 + j] = q[j, lane] | (q[16 + j, lane] << 4)


@kernel
def _encode_iq4_xs(values: Any, importance: Any, steps: Any, out: Any) -> None:
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    q, s = np.empty((_GROUP, LANES), np.uint8), np.empty((6, LANES), np.float32)
    scales, codes = np.empty((2, _GROUPS, LANES), np.float32)
    errors = np.empty((_GROUPS, LANES), np.float32)
    whole = np.empty((6, LANES), np.float32)
    d, real = whole[0], whole[1]
    weighted = importance.shape[0] > 0
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        gather(values, importance, first, count, x, w)
        for lane in range(LANES):
            d[lane] = _ZERO
        for g in range(_GROUPS):
            part = slice(g * _GROUP, (g + 1) * _GROUP)
            _group(x[part], w[part], weighted, steps, s, scales[g])
            for lane in range(LANES):
                larger = abs(scales[g, lane]) > abs(d[lane])
                d[lane] = scales[g, lane] if larger else d[lane]
        for lane in range(LANES):
            d[lane] = from_half(to_half(d[lane] / np.float32(-32)))
        _choose(x, w, weighted, scales, d, codes, errors, s, whole)
        _solve(x, w, weighted, codes, errors, d, s, whole)
        for lane in range(count):
            block = out[first + lane]
            bits = to_half(d[lane])
            block[0], block[1] = np.uint8(bits & np.uint32(255)), np.uint8(bits >> np.uint32(8))
            for g in range(6):
                block[2 + g] = 0
            for g in range(_GROUPS):
                code = np.uint8(codes[g, lane] + np.float32(32))
                block[2 + g // 4] |= (code >> 4) << (2 * (g % 4))
                block[4 + g // 2] |= (code & 15) << (4 * (g % 2))
        for g in range(_GROUPS):
            for lane in range(LANES):
                real[lane] = d[lane] * codes[g, lane]
            _codes(x[g * _GROUP : (g + 1) * _GROUP], real, q)
            for lane in range(count):
                block = out[first + lane]
                for j in range(16):
                    block[8 + g * 16 + j] = q[j, lane] | (q[16 + j, lane] << 4)


@inner
def _choose(
    x: Any, w: Any, weighted: bool, scales: Any, d: Any, codes: Any, errors: Any, s: Any,
    whole: Any,
) -> None:  # fmt: skip
    """Codes of scales: the nearest ones, or neighbours of them with a smaller error."""
    real, code = whole[1], whole[2]
    for g in range(_GROUPS):
        part = slice(g * _GROUP, (g + 1) * _GROUP)
        for lane in range(LANES):
            errors[g, lane] = np.float32(np.inf)
        for step in range(-1, 2):
            for lane in range(LANES):
                f = _ONE / d[lane] if d[lane] != _ZERO else _ZERO
                near = np.float32(np.rint(scales[g, lane] * f)) + np.float32(step)
                code[lane] = min(max(near, np.float32(-32)), np.float32(31))
                real[lane] = d[lane] * code[lane]
            _error(x[part], w[part], weighted, real, s)
            for lane in range(LANES):
                better = s[0, lane] < errors[g, lane]
                errors[g, lane] = s[0, lane] if better else errors[g, lane]
                codes[g, lane] = code[lane] if better else codes[g, lane]


@inner
def _solve(
    x: Any, w: Any, weighted: bool, codes: Any, errors: Any, d: Any, s: Any, whole: Any
) -> None:
    """Given all codes, the best shared scale; kept where the error is smaller."""
    real, aa, ax, before, after = whole[1], whole[2], whole[3], whole[4], whole[5]
    for lane in range(LANES):
        aa[lane] = _ZERO
        ax[lane] = _ZERO
        before[lane] = _ZERO
        after[lane] = _ZERO
    for g in range(_GROUPS):
        part = slice(g * _GROUP, (g + 1) * _GROUP)
        for lane in range(LANES):
            scale = d[lane] * codes[g, lane]
            s[3, lane] = _ONE / scale if scale != _ZERO else _ZERO
        _sums(x[part], w[part], weighted, s[3], s)
        for lane in range(LANES):
            a = codes[g, lane]
            aa[lane] += a * a * s[0, lane]
            ax[lane] += a * s[1, lane]
            before[lane] += errors[g, lane]
    for lane in range(LANES):
        solved = ax[lane] / aa[lane] if aa[lane] > _ZERO else d[lane]
        aa[lane] = from_half(to_half(solved))
    for g in range(_GROUPS):
        part = slice(g * _GROUP, (g + 1) * _GROUP)
        for lane in range(LANES):
            real[lane] = aa[lane] * codes[g, lane]
        _error(x[part], w[part], weighted, real, s)
        for lane in range(LANES):
            after[lane] += s[0, lane]
    for lane in range(LANES):
        d[lane] = aa[lane] if after[lane] < before[lane] else d[lane]


def decode_iq4_nl(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_iq4_nl(stored.reshape(-1, _NL_BYTES), out.reshape(-1, _GROUP))


def decode_iq4_xs(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_iq4_xs(stored.reshape(-1, _XS_BYTES), out.reshape(-1, BLOCK))


@kernel
def _decode_iq4_nl(stored: Any, out: Any) -> None:
    for n in range(stored.shape[0]):
        block = stored[n]
        d = from_half(np.uint32(block[0]) | (np.uint32(block[1]) << np.uint32(8)))
        for j in range(16):
            out[n, j] = d * VALUES[block[2 + j] & 15]
            out[n, 16 + j] = d * VALUES[block[2 + j] >> 4]


@kernel
def _decode_iq4_xs(stored: Any, out: Any) -> None:
    for n in range(stored.shape[0]):
        block = stored[n]
        d = from_half(np.uint32(block[0]) | (np.uint32(block[1]) << np.uint32(8)))
        for g in range(_GROUPS):
            low = (block[4 + g // 2] >> (4 * (g % 2))) & 15
            high = (block[2 + g // 4] >> (2 * (g % 4))) & 3
            real = np.float32(d * np.float32(np.int32(low | (high << 4)) - 32))
            for j in range(16):
                byte = block[8 + g * 16 + j]
                out[n, g * _GROUP + j] = real * VALUES[byte & 15]
                out[n, g * _GROUP + 16 + j] = real * VALUES[byte >> 4]
