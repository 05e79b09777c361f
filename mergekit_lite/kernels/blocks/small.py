"""Ternary blocks, TQ1_0 and TQ2_0, and MXFP4, whose scale is a power of two.

Source of layouts, and of what is written, bit for bit: ``quantize_row_tq1_0_ref``,
``quantize_row_tq2_0_ref`` and ``quantize_row_mxfp4_ref`` of ggml, as gguf-py computes them; MXFP4
is that of the OCP Microscaling Formats specification, version 1.0, 2023.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.blocks.half import from_half, to_half
from mergekit_lite.kernels.cast import bits_of, float_of
from mergekit_lite.kernels.jit import inner, kernel

__all__ = [
    "decode_mxfp4", "decode_tq1_0", "decode_tq2_0", "encode_mxfp4", "encode_tq1_0", "encode_tq2_0",
]  # fmt: skip

_BLOCK = 256
_GROUP = 32
_FLOATS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""What the 16 codes of MXFP4 stand for, doubled."""

_POWERS = np.array([81, 27, 9, 3, 1], np.int32)
_THREES = np.array([1, 3, 9, 27, 81], np.uint8)


def encode_tq1_0(values: Array, _importance: Array | None, out: Array) -> None:
    """1.6875 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_ternary(np.ascontiguousarray(values).reshape(-1, _BLOCK), True, out.reshape(-1, 54))


def encode_tq2_0(values: Array, _importance: Array | None, out: Array) -> None:
    """2.0625 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_ternary(np.ascontiguousarray(values).reshape(-1, _BLOCK), False, out.reshape(-1, 66))


def encode_mxfp4(values: Array, _importance: Array | None, out: Array) -> None:
    """4.25 bits: see `mergekit_lite.kernels.blocks.types.Encode`."""
    _encode_mxfp4(np.ascontiguousarray(values).reshape(-1, _GROUP), out.reshape(-1, 17))


@kernel
def _encode_ternary(values: Any, by_threes: bool, out: Any) -> None:
    q = np.empty(_BLOCK, np.int32)
    for n in range(values.shape[0]):
        row, block = values[n], out[n]
        d = np.float32(0)
        for j in range(_BLOCK):
            d = max(d, abs(row[j]))
        f = np.float32(1) / d if d > np.float32(1e-37) else np.float32(0)
        for j in range(_BLOCK):
            x = np.float32(row[j] * f)
            q[j] = 1 + (x >= np.float32(0.5)) - (x <= np.float32(-0.5))
        if by_threes:
            _put_threes(q, block)
        else:
            for half in range(2):
                for j in range(32):
                    at = half * 128 + j
                    block[half * 32 + j] = np.uint8(
                        q[at] | (q[at + 32] << 2) | (q[at + 64] << 4) | (q[at + 96] << 6)
                    )
        bits = to_half(d)
        last = block.size - 2
        block[last] = np.uint8(bits & np.uint32(0xFF))
        block[last + 1] = np.uint8(bits >> np.uint32(8))


@inner
def _put_threes(q: Any, block: Any) -> None:
    """Five ternary digits in a byte, as a fraction of 3⁵, so that they come out by multiplying."""
    for j in range(52):
        if j < 32:
            first, step, count = j, 32, 5
        elif j < 48:
            first, step, count = 160 + (j - 32), 16, 5
        else:
            first, step, count = 240 + (j - 48), 4, 4
        whole = 0
        for k in range(count):
            whole += q[first + k * step] * _POWERS[k]
        block[j] = np.uint8((whole * 256 + 242) // 243)


@inner
def _exponent(largest: Any) -> Any:
    """The stored exponent: that of the largest element, less two, above −127."""
    bits = bits_of(np.float32(largest)) >> np.uint32(23)
    return max(np.int32(bits) - 2, 0)


@inner
def _power(exponent: Any) -> Any:
    """Half of 2 to the power of a stored exponent; half, for the values are doubled."""
    if exponent < 2:
        return float_of(np.uint32(0x00200000) << np.uint32(exponent))
    return float_of(np.uint32(exponent - 1) << np.uint32(23))


@kernel
def _encode_mxfp4(values: Any, out: Any) -> None:
    q = np.empty(_GROUP, np.uint8)
    for n in range(values.shape[0]):
        row, block = values[n], out[n]
        largest = np.float32(0)
        for j in range(_GROUP):
            largest = max(largest, abs(row[j]))
        exponent = _exponent(largest)
        d = _power(exponent)
        for j in range(_GROUP):
            least, code = abs(row[j]), 0
            for k in range(1, 16):
                error = abs(np.float32(d * _FLOATS[k]) - row[j])
                code = k if error < least else code
                least = min(least, error)
            q[j] = code
        block[0] = np.uint8(exponent)
        for j in range(16):
            block[1 + j] = q[j] | (q[16 + j] << 4)


def decode_tq1_0(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_ternary(stored.reshape(-1, 54), out.reshape(-1, _BLOCK), True)


def decode_tq2_0(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_ternary(stored.reshape(-1, 66), out.reshape(-1, _BLOCK), False)


def decode_mxfp4(stored: Array, out: Array) -> None:
    """See `mergekit_lite.kernels.blocks.types.Decode`."""
    _decode_mxfp4(stored.reshape(-1, 17), out.reshape(-1, _GROUP))


@kernel
def _decode_ternary(stored: Any, out: Any, by_threes: bool) -> None:
    for n in range(stored.shape[0]):
        block = stored[n]
        last = block.size - 2
        d = from_half(np.uint32(block[last]) | (np.uint32(block[last + 1]) << np.uint32(8)))
        for j in range(_BLOCK):
            if not by_threes:
                code = np.int32((block[j // 128 * 32 + j % 32] >> (j % 128 // 32 * 2)) & 3)
            else:
                if j < 160:
                    at, power = j % 32, j // 32
                elif j < 240:
                    at, power = 32 + (j - 160) % 16, (j - 160) // 16
                else:
                    at, power = 48 + (j - 240) % 4, (j - 240) // 4
                digit = np.uint8(block[at] * _THREES[power])
                code = (np.int32(digit) * 3) >> 8
            out[n, j] = d * np.float32(code - 1)


@kernel
def _decode_mxfp4(stored: Any, out: Any) -> None:
    for n in range(stored.shape[0]):
        block = stored[n]
        d = _power(block[0])
        for j in range(16):
            out[n, j] = d * _FLOATS[block[1 + j] & 15]
            out[n, 16 + j] = d * _FLOATS[block[1 + j] >> 4]
