"""Stored bits to working floats and back, one rounding, to nearest even.

Inside kernels, `load` and `store` move a tile between an array as it is stored and a float buffer.
A ``uint16`` array holds bfloat16 bits; float32 and float64 arrays hold themselves. Types that
numba has no arithmetic for (float16, float8) are decoded whole by `decode` before a kernel runs,
and encoded by `encode` after it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from mergekit_lite.dtypes import DTYPES, Array, DType
from mergekit_lite.kernels.jit import inner, intrinsic, kernel, overloads

__all__ = ["bits_of", "decode", "encode", "float_of", "in_kernel", "load", "store", "widened"]


def load(source: Any, start: int, count: int, tile: Any) -> None:
    """Decode ``source[start : start + count]`` into ``tile[:count]`` (only inside kernels)."""
    raise NotImplementedError


def store(tile: Any, count: int, target: Any, start: int) -> None:
    """Encode ``tile[:count]`` into ``target[start : start + count]`` (only inside kernels)."""
    raise NotImplementedError


@overloads(load)
def _load(source: Any, start: Any, count: Any, tile: Any) -> Any:
    if source.dtype == numba.uint16:

        def bfloat16(source: Any, start: Any, count: Any, tile: Any) -> None:
            bits = source[start : start + count]
            target = tile[:count]
            for i in range(count):
                target[i] = float_of(np.uint32(bits[i]) << np.uint32(16))

        return bfloat16

    def native(source: Any, start: Any, count: Any, tile: Any) -> None:
        values = source[start : start + count]
        target = tile[:count]
        for i in range(count):
            target[i] = values[i]

    return native


@overloads(store)
def _store(tile: Any, count: Any, target: Any, start: Any) -> Any:
    if target.dtype == numba.uint16:
        if tile.dtype == numba.float64:

            def from_double(tile: Any, count: Any, target: Any, start: Any) -> None:
                out = target[start : start + count]
                for i in range(count):
                    out[i] = _round_bits(bits_of(_round_to_odd(tile[i])))

            return from_double

        def from_single(tile: Any, count: Any, target: Any, start: Any) -> None:
            out = target[start : start + count]
            for i in range(count):
                out[i] = _round_bits(bits_of(tile[i]))

        return from_single

    def native(tile: Any, count: Any, target: Any, start: Any) -> None:
        out = target[start : start + count]
        for i in range(count):
            out[i] = tile[i]

    return native


@inner
def _round_bits(bits: Any) -> Any:
    """Round the bits of a float32 to bfloat16, to nearest even; NaN stays NaN."""
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(quiet if is_nan else rounded)


@inner
def _round_to_odd(value: Any) -> Any:
    """Narrow a float64 to float32 by rounding to odd, so that a second rounding is exact.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008, section 3.
    """
    narrow = np.float32(value)
    bits = bits_of(narrow)
    if np.isfinite(narrow) and np.float64(narrow) != value and not bits & np.uint32(1):
        # The neighbour on the other side of the value has an odd last bit.
        away = abs(np.float64(narrow)) > abs(value)
        narrow = float_of(bits - np.uint32(1)) if away else float_of(bits + np.uint32(1))
    return narrow


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """Reinterpret a uint32 as a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(numba.float32))

    return numba.float32(numba.uint32), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """Reinterpret a float32 as a uint32, or a float64 as a uint64."""
    bits = numba.uint32 if value == numba.float32 else numba.uint64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(bits))

    return bits(value), codegen


def in_kernel(dtype: DType) -> bool:
    """Whether kernels read and write this type themselves."""
    return dtype.name in {"BF16", "F32", "F64"}


@cache
def _float8_values(name: str) -> Array:
    """The 256 values of a float8 type, as float32.

    Source: OCP 8-bit Floating Point Specification, revision 1.0, 2023, table 1.
    """
    mantissa_bits, bias = (3, 7) if name == "F8_E4M3" else (2, 15)
    codes = np.arange(256)
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(
        exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias)
    )
    if name == "F8_E4M3":
        value[(codes & 0x7F) == 0x7F] = np.nan
    else:
        value[(codes & 0x7F) == 0x7C] = np.inf
        value[(codes & 0x7F) > 0x7C] = np.nan
    return np.where(codes & 0x80, -value, value).astype(np.float32)


def decode(source: Array, dtype: DType, out: Array) -> None:
    """Decode stored elements into a float32 or float64 array of the same length."""
    if dtype.name == "BF16":
        _decode_bfloat16(source, out)
    elif dtype.name.startswith("F8"):
        np.take(_float8_values(dtype.name), source, out=out if out.dtype == np.float32 else None)
        if out.dtype != np.float32:
            out[:] = _float8_values(dtype.name)[source]
    else:
        out[:] = source


def encode(values: Array, dtype: DType, out: Array) -> None:
    """Round float32 or float64 values to nearest even into stored elements.

    A value beyond the largest finite one becomes infinite; in float8 E4M3, which has no infinity,
    it becomes that largest one, 448 (saturation in the OCP specification, and what PyTorch does).
    """
    if dtype.name == "BF16":
        _encode_bfloat16(values, out)
    elif dtype.name.startswith("F8"):
        out[:] = _encode_float8(values, dtype.name)
    else:
        with np.errstate(over="ignore"):
            out[:] = values


def widened(stored: Array, work: np.dtype[Any]) -> Array:
    """Decode an array that kernels read themselves (see `in_kernel`) into the working type."""
    out = np.empty(stored.shape, work)
    decode(stored, DTYPES["BF16"] if stored.dtype == np.uint16 else DTYPES["F32"], out)
    return out


def _encode_float8(values: Array, name: str) -> Array:
    table = _float8_values(name)[:128].astype(np.float64)
    last = int(np.flatnonzero(np.isfinite(table))[-1])
    finite = table[: last + 1]
    # Half-way points; the step beyond the last value decides what overflows.
    step = finite[-1] - finite[-2]
    middles = np.append((finite[1:] + finite[:-1]) / 2, finite[-1] + step / 2)
    size = np.abs(values).astype(np.float64)
    code = np.searchsorted(middles, size, side="left")
    on_middle = (code <= last) & (size == middles[np.minimum(code, last)])
    code = np.where(on_middle & (code % 2 == 1), code + 1, code)
    code = np.minimum(code, last if name == "F8_E4M3" else last + 1)
    code = np.where(np.isnan(values), 0x7F, code)
    return (code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


@kernel
def _decode_bfloat16(source: Any, out: Any) -> None:
    load(source, 0, source.size, out)


@kernel
def _encode_bfloat16(values: Any, out: Any) -> None:
    store(values, values.size, out, 0)
