"""K-quants: blocks of 256 elements in groups of 16 or 32, each with a scale of 4 to 8 bits.

Source of the layouts: ``block_q2_K`` to ``block_q6_K`` of ggml (ggml-common.h), as gguf-py reads
them (``gguf.quants``). The search is our own; see `mergekit_lite.kernels.blocks.search`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.blocks.half import from_half
from mergekit_lite.kernels.blocks.search import BLOCK, LANES, affine, gather, symmetric
from mergekit_lite.kernels.jit import inner, kernel

__all__ = [
    "decode_q2_k", "decode_q3_k", "decode_q4_k", "decode_q5_k", "decode_q6_k",
    "encode_q2_k", "encode_q3_k", "encode_q4_k", "encode_q5_k", "encode_q6_k",
]  # fmt: skip

_WORK = 32 + 6 * 16


def _blocks(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK)


def _weights(importance: Array | None) -> Array:
    if importance is None:
        return np.empty((0, BLOCK), np.float32)
    return np.ascontiguousarray(importance, np.float32).reshape(-1, BLOCK)


def _steps(first: float, last: float, count: int) -> Array:
    return np.linspace(first, last, count).astype(np.float32)


_Q2_STEPS = _steps(-0.5, 1.0, 16)
_Q3_STEPS = _steps(-0.9, 0.9, 10)
_Q4_STEPS = _steps(-1.0, 1.4, 13)
_Q5_STEPS = _steps(-1.0, 1.0, 11)
_Q6_STEPS = _steps(-0.9, 0.9, 9)


def encode_q2_k(values: Array, importance: Array | None, out: Array) -> None:
    """2.625 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_q2_k(_blocks(values), _weights(importance), _Q2_STEPS, out.reshape(-1, 84))


def encode_q3_k(values: Array, importance: Array | None, out: Array) -> None:
    """3.4375 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_q3_k(_blocks(values), _weights(importance), _Q3_STEPS, out.reshape(-1, 110))


def encode_q4_k(values: Array, importance: Array | None, out: Array) -> None:
    """4.5 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_q45_k(_blocks(values), _weights(importance), _Q4_STEPS, 15, out.reshape(-1, 144))


def encode_q5_k(values: Array, importance: Array | None, out: Array) -> None:
    """5.5 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_q45_k(_blocks(values), _weights(importance), _Q5_STEPS, 31, out.reshape(-1, 176))


def encode_q6_k(values: Array, importance: Array | None, out: Array) -> None:
    """6.5625 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_q6_k(_blocks(values), _weights(importance), _Q6_STEPS, out.reshape(-1, 210))


@kernel
def _encode_q45_k(values: Any, importance: Any, steps: Any, top: int, out: Any) -> None:
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    q, work = np.empty((BLOCK, LANES), np.uint8), np.empty((_WORK, LANES), np.float32)
    found = np.zeros((18, LANES), np.float32)
    weighted = importance.shape[0] > 0
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        gather(values, importance, first, count, x, w)
        affine(x, w, weighted, 32, top, 63, steps, found, q, work)
        for lane in range(count):
            block = out[first + lane]
            _put_half(block, 0, found[0, lane])
            _put_half(block, 2, found[1, lane])
            for g in range(4):
                scale, minimum = np.uint8(found[2 + g, lane]), np.uint8(found[10 + g, lane])
                upper, below = np.uint8(found[6 + g, lane]), np.uint8(found[14 + g, lane])
                block[4 + g] = scale | ((upper >> 4) << 6)
                block[8 + g] = minimum | ((below >> 4) << 6)
                block[12 + g] = (upper & 15) | ((below & 15) << 4)
            at = 16
            if top == 31:
                at = 48
                for j in range(32):
                    bits = np.uint8(0)
                    for g in range(8):
                        bits |= (q[g * 32 + j, lane] >> 4) << g
                    block[16 + j] = bits
            for g in range(4):
                for j in range(32):
                    low, high = q[g * 64 + j, lane], q[g * 64 + 32 + j, lane]
                    block[at + g * 32 + j] = (low & 15) | ((high & 15) << 4)


@kernel
def _encode_q2_k(values: Any, importance: Any, steps: Any, out: Any) -> None:
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    q, work = np.empty((BLOCK, LANES), np.uint8), np.empty((_WORK, LANES), np.float32)
    found = np.zeros((34, LANES), np.float32)
    weighted = importance.shape[0] > 0
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        gather(values, importance, first, count, x, w)
        affine(x, w, weighted, 16, 3, 15, steps, found, q, work)
        for lane in range(count):
            block = out[first + lane]
            for g in range(16):
                block[g] = np.uint8(found[2 + g, lane]) | (np.uint8(found[18 + g, lane]) << 4)
            _put_quarters(q, lane, block, 16)
            _put_half(block, 80, found[0, lane])
            _put_half(block, 82, found[1, lane])


@inner
def _put_quarters(q: Any, lane: int, block: Any, at: int) -> None:
    """The lower two bits of all codes: bytes hold elements that are 32 apart."""
    for half in range(2):
        for j in range(32):
            bits = np.uint8(0)
            for part in range(4):
                bits |= (q[half * 128 + part * 32 + j, lane] & 3) << (2 * part)
            block[at + half * 32 + j] = bits


@kernel
def _encode_q3_k(values: Any, importance: Any, steps: Any, out: Any) -> None:
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    q, work = np.empty((BLOCK, LANES), np.uint8), np.empty((_WORK, LANES), np.float32)
    found = np.zeros((17, LANES), np.float32)
    weighted = importance.shape[0] > 0
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        gather(values, importance, first, count, x, w)
        symmetric(x, w, weighted, 16, 4, 32, steps, True, found, q, work)
        for lane in range(count):
            block = out[first + lane]
            for j in range(32):
                bits = np.uint8(0)
                for g in range(8):
                    bits |= (q[g * 32 + j, lane] >> 2) << g
                block[j] = bits
            _put_quarters(q, lane, block, 32)
            for g in range(12):
                block[96 + g] = 0
            for g in range(16):
                code = np.uint8(found[1 + g, lane] + np.float32(32))
                block[96 + g % 8] |= (code & 15) << (4 * (g // 8))
                block[104 + g % 4] |= (code >> 4) << (2 * (g // 4))
            _put_half(block, 108, found[0, lane])


@kernel
def _encode_q6_k(values: Any, importance: Any, steps: Any, out: Any) -> None:
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    q, work = np.empty((BLOCK, LANES), np.uint8), np.empty((_WORK, LANES), np.float32)
    found = np.zeros((17, LANES), np.float32)
    weighted = importance.shape[0] > 0
    for first in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - first)
        gather(values, importance, first, count, x, w)
        symmetric(x, w, weighted, 16, 32, 128, steps, False, found, q, work)
        for lane in range(count):
            block = out[first + lane]
            for half in range(2):
                for j in range(32):
                    a, b = q[half * 128 + j, lane], q[half * 128 + 32 + j, lane]
                    c, d = q[half * 128 + 64 + j, lane], q[half * 128 + 96 + j, lane]
                    block[half * 64 + j] = (a & 15) | ((c & 15) << 4)
                    block[half * 64 + 32 + j] = (b & 15) | ((d & 15) << 4)
                    block[128 + half * 32 + j] = (
                        (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
                    )
            for g in range(16):
                block[192 + g] = np.uint8(np.int8(found[1 + g, lane]))
            _put_half(block, 208, found[0, lane])


@inner
def _put_half(block: Any, at: int, bits: Any) -> None:
    """Two bytes of a float16, whose bits are given as a number."""
    whole = np.uint32(bits)
    block[at] = np.uint8(whole & np.uint32(0xFF))
    block[at + 1] = np.uint8(whole >> np.uint32(8))


@inner
def _get_half(block: Any, at: int) -> Any:
    return from_half(np.uint32(block[at]) | (np.uint32(block[at + 1]) << np.uint32(8)))


def decode_q2_k(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_q2_k(stored.reshape(-1, 84), out.reshape(-1, BLOCK))


def decode_q3_k(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_q3_k(stored.reshape(-1, 110), out.reshape(-1, BLOCK))


def decode_q4_k(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_q45_k(stored.reshape(-1, 144), out.reshape(-1, BLOCK), 15)


def decode_q5_k(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_q45_k(stored.reshape(-1, 176), out.reshape(-1, BLOCK), 31)


def decode_q6_k(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_q6_k(stored.reshape(-1, 210), out.reshape(-1, BLOCK))


@kernel
def _decode_q45_k(stored: Any, out: Any, top: int) -> None:
    for n in range(stored.shape[0]):
        block, target = stored[n], out[n]
        d, m = _get_half(block, 0), _get_half(block, 2)
        at = 48 if top == 31 else 16
        for g in range(8):
            if g < 4:
                scale, minimum = block[4 + g] & 63, block[8 + g] & 63
            else:
                scale = (block[8 + g] & 15) | ((block[g] >> 6) << 4)
                minimum = (block[8 + g] >> 4) | ((block[4 + g] >> 6) << 4)
            real = np.float32(d * np.float32(scale))
            offset = np.float32(m * np.float32(minimum))
            for j in range(32):
                code = (block[at + g // 2 * 32 + j] >> (4 * (g % 2))) & 15
                if top == 31:
                    code |= ((block[16 + j] >> g) & 1) << 4
                target[g * 32 + j] = np.float32(real * np.float32(code)) - offset


@kernel
def _decode_q2_k(stored: Any, out: Any) -> None:
    for n in range(stored.shape[0]):
        block, target = stored[n], out[n]
        d, m = _get_half(block, 80), _get_half(block, 82)
        for g in range(16):
            real = np.float32(d * np.float32(block[g] & 15))
            offset = np.float32(m * np.float32(block[g] >> 4))
            for j in range(16):
                k = g * 16 + j
                code = (block[16 + k // 128 * 32 + k % 32] >> (k % 128 // 32 * 2)) & 3
                target[k] = np.float32(real * np.float32(code)) - offset


@kernel
def _decode_q3_k(stored: Any, out: Any) -> None:
    for n in range(stored.shape[0]):
        block, target = stored[n], out[n]
        d = _get_half(block, 108)
        for g in range(16):
            low = (block[96 + g % 8] >> (4 * (g // 8))) & 15
            high = (block[104 + g % 4] >> (2 * (g // 4))) & 3
            real = np.float32(d * np.float32(np.int32(low | (high << 4)) - 32))
            for j in range(16):
                k = g * 16 + j
                code = np.int32((block[32 + k // 128 * 32 + k % 32] >> (k % 128 // 32 * 2)) & 3)
                code += 4 * np.int32((block[k % 32] >> (k // 32)) & 1) - 4
                target[k] = real * np.float32(code)


@kernel
def _decode_q6_k(stored: Any, out: Any) -> None:
    for n in range(stored.shape[0]):
        block, target = stored[n], out[n]
        d = _get_half(block, 208)
        for g in range(16):
            real = np.float32(d * np.float32(np.int8(block[192 + g])))
            for j in range(16):
                k = g * 16 + j
                half, part = k // 128, k % 128 // 32
                low = (block[half * 64 + part % 2 * 32 + k % 32] >> (4 * (part // 2))) & 15
                high = (block[128 + half * 32 + k % 32] >> (2 * part)) & 3
                target[k] = real * np.float32(np.int32(low | (high << 4)) - 32)
