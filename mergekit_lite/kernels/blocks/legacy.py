"""Blocks of 32 with float16 scales of their own: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Source of layouts, and of what is written without importance, bit for bit: ``quantize_row_*_ref`` of
ggml, as gguf-py computes them. With importance, scales are searched for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.blocks.half import from_half, rounded, to_half
from mergekit_lite.kernels.blocks.search import (
    BLOCK,
    LANES,
    affine_group,
    gather,
    round_group,
    symmetric_group,
)
from mergekit_lite.kernels.jit import inner, kernel

__all__ = [
    "decode_q4_0", "decode_q4_1", "decode_q5_0", "decode_q5_1", "decode_q8_0",
    "encode_q4_0", "encode_q4_1", "encode_q5_0", "encode_q5_1", "encode_q8_0",
]  # fmt: skip

_GROUP = 32
_GROUPS = BLOCK // _GROUP
_AFFINE_STEPS = np.linspace(-1.0, 1.4, 13).astype(np.float32)
_SYMMETRIC_STEPS = np.linspace(-0.9, 0.9, 10).astype(np.float32)
_BYTES = {(4, False): 18, (4, True): 20, (5, False): 22, (5, True): 24}


def encode_q8_0(values: Array, _importance: Array | None, out: Array) -> None:
    """8.5 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_q8_0(np.ascontiguousarray(values).reshape(-1, _GROUP), out.reshape(-1, 34))


def encode_q4_0(values: Array, importance: Array | None, out: Array) -> None:
    """4.5 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode(values, importance, out, 4, minimum=False)


def encode_q4_1(values: Array, importance: Array | None, out: Array) -> None:
    """5 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode(values, importance, out, 4, minimum=True)


def encode_q5_0(values: Array, importance: Array | None, out: Array) -> None:
    """5.5 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode(values, importance, out, 5, minimum=False)


def encode_q5_1(values: Array, importance: Array | None, out: Array) -> None:
    """6 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode(values, importance, out, 5, minimum=True)


def _encode(
    values: Array, importance: Array | None, out: Array, bits: int, *, minimum: bool
) -> None:
    size = _BYTES[bits, minimum]
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if importance is None:
        encode = _encode_affine if minimum else _encode_symmetric
        encode(flat.reshape(-1, _GROUP), bits, out.reshape(-1, size))
        return
    # Rows need not be whole blocks of 256, so every block gets weights of its own.
    blocks = -(-flat.size // BLOCK)
    padded, weights = np.zeros((2, blocks * BLOCK), np.float32)
    padded[: flat.size] = flat
    weights[: flat.size] = np.tile(importance, values.shape[0])
    stored = np.empty((blocks * _GROUPS, size), np.uint8)
    steps = _AFFINE_STEPS if minimum else _SYMMETRIC_STEPS
    _encode_weighted(
        padded.reshape(-1, BLOCK), weights.reshape(-1, BLOCK), steps, bits, minimum, stored
    )
    out.reshape(-1, size)[:] = stored[: flat.size // _GROUP]


@kernel
def _encode_q8_0(values: Any, out: Any) -> None:
    for n in range(values.shape[0]):
        row, block = values[n], out[n]
        largest = np.float32(0)
        for j in range(_GROUP):
            largest = max(largest, abs(row[j]))
        d = np.float32(largest / np.float32(127))
        f = np.float32(1) / d if d > np.float32(1e-37) else np.float32(0)
        _put_half(block, 0, d)
        for j in range(_GROUP):
            x = np.float32(row[j] * f)
            # To the nearest, halves away from zero.
            size = abs(x)
            whole = np.int32(size)
            whole += (size - np.float32(whole)) >= np.float32(0.5)
            block[2 + j] = np.uint8(-whole if x < 0 else whole)


@kernel
def _encode_symmetric(values: Any, bits: int, out: Any) -> None:
    q = np.empty(_GROUP, np.uint8)
    top = 1 << (bits - 1)
    for n in range(values.shape[0]):
        row = values[n]
        extreme = row[0]
        for j in range(1, _GROUP):
            extreme = row[j] if abs(row[j]) > abs(extreme) else extreme
        d = np.float32(extreme / np.float32(-top))
        f = np.float32(1) / d if abs(d) > np.float32(1e-37) else np.float32(0)
        for j in range(_GROUP):
            t = np.float32(np.float32(row[j] * f) + (np.float32(top) + np.float32(0.5)))
            q[j] = _within(t, 2 * top - 1)
        _put_half(out[n], 0, d)
        _put_codes(out[n], 2, q, bits)


@kernel
def _encode_affine(values: Any, bits: int, out: Any) -> None:
    q = np.empty(_GROUP, np.uint8)
    top = (1 << bits) - 1
    for n in range(values.shape[0]):
        row = values[n]
        least, most = row[0], row[0]
        for j in range(1, _GROUP):
            least, most = min(least, row[j]), max(most, row[j])
        d = np.float32(np.float32(most - least) / np.float32(top))
        f = np.float32(1) / d if d > np.float32(1e-37) else np.float32(0)
        for j in range(_GROUP):
            t = np.float32(np.float32(np.float32(row[j] - least) * f) + np.float32(0.5))
            q[j] = _within(t, top)
        _put_half(out[n], 0, d)
        _put_half(out[n], 2, least)
        _put_codes(out[n], 4, q, bits)


@kernel
def _encode_weighted(
    values: Any, importance: Any, steps: Any, bits: int, minimum: bool, out: Any
) -> None:
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    q, s = np.empty((_GROUP, LANES), np.uint8), np.empty((10, LANES), np.float32)
    best, code = np.empty((3, LANES), np.float32), np.empty(_GROUP, np.uint8)
    top = (1 << bits) - 1 if minimum else 1 << (bits - 1)
    low = np.float32(0) if minimum else np.float32(-top)
    high = np.float32(top) if minimum else np.float32(top - 1)
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        gather(values, importance, first, count, x, w)
        for g in range(_GROUPS):
            part = slice(g * _GROUP, (g + 1) * _GROUP)
            if minimum:
                affine_group(x[part], w[part], True, top, steps, True, s, best)
            else:
                symmetric_group(x[part], w[part], True, low, high, steps, True, s, best)
            for lane in range(LANES):
                best[1, lane] = rounded(best[1, lane])
                best[2, lane] = rounded(best[2, lane]) if minimum else np.float32(0)
            round_group(x[part], best[1], best[2], low, high, s, q)
            for lane in range(count):
                block = out[(first + lane) * _GROUPS + g]
                for j in range(_GROUP):
                    code[j] = q[j, lane]
                _put_half(block, 0, best[1, lane])
                if minimum:
                    _put_half(block, 2, -best[2, lane])
                _put_codes(block, 4 if minimum else 2, code, bits)


@inner
def _within(value: Any, top: Any) -> Any:
    """The whole part of a number, from 0 to a top."""
    return min(max(np.int32(value), 0), top)


@inner
def _put_half(block: Any, at: int, value: Any) -> None:
    bits = to_half(value)
    block[at] = np.uint8(bits & np.uint32(0xFF))
    block[at + 1] = np.uint8(bits >> np.uint32(8))


@inner
def _get_half(block: Any, at: int) -> Any:
    return from_half(np.uint32(block[at]) | (np.uint32(block[at + 1]) << np.uint32(8)))


@inner
def _put_codes(block: Any, at: int, q: Any, bits: int) -> None:
    """Fifth bits, if there are any, then the lower four of elements that are 16 apart."""
    if bits == 5:
        for byte in range(4):
            held = np.uint8(0)
            for j in range(8):
                held |= (q[byte * 8 + j] >> 4) << j
            block[at + byte] = held
        at += 4
    for j in range(16):
        block[at + j] = (q[j] & 15) | ((q[16 + j] & 15) << 4)


def decode_q8_0(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_q8_0(stored.reshape(-1, 34), out.reshape(-1, _GROUP))


def decode_q4_0(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode(stored.reshape(-1, 18), out.reshape(-1, _GROUP), 4, False)


def decode_q4_1(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode(stored.reshape(-1, 20), out.reshape(-1, _GROUP), 4, True)


def decode_q5_0(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode(stored.reshape(-1, 22), out.reshape(-1, _GROUP), 5, False)


def decode_q5_1(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode(stored.reshape(-1, 24), out.reshape(-1, _GROUP), 5, True)


@kernel
def _decode_q8_0(stored: Any, out: Any) -> None:
    for n in range(stored.shape[0]):
        block = stored[n]
        d = _get_half(block, 0)
        for j in range(_GROUP):
            out[n, j] = np.float32(np.int8(block[2 + j])) * d


@kernel
def _decode(stored: Any, out: Any, bits: int, minimum: bool) -> None:
    for n in range(stored.shape[0]):
        block = stored[n]
        d = _get_half(block, 0)
        m = _get_half(block, 2) if minimum else np.float32(0)
        at = 4 if minimum else 2
        fifth = at
        at += 4 if bits == 5 else 0
        low = 0 if minimum else 1 << (bits - 1)
        for j in range(_GROUP):
            code = np.int32((block[at + j % 16] >> (4 * (j // 16))) & 15)
            if bits == 5:
                code |= np.int32((block[fifth + j // 8] >> (j % 8)) & 1) << 4
            real = np.float32(d * np.float32(code - low))
            out[n, j] = real + m if minimum else real
