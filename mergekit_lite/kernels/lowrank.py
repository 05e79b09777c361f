"""Products of two thin factors, added to rows of a weight, in an order that nothing changes.

An element is a sum over the rank, taken from the first to the last with fused multiply-adds, each
rounded once, so that its bits depend on its row of the one factor and its column of the other
alone: not on how the weight is cut, on threads, or on how wide the machine's vectors are. (A BLAS
gives other bits for another number of rows.) Eight rows and four ranks are taken together, which
keeps the arithmetic units, not the memory, busy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.jit import intrinsic, kernel

__all__ = ["RANKS", "add_low_rank", "column_squares", "normed_columns", "normed_rows"]

RANKS = 4
"""Ranks that are summed together; factors are padded with zeros to a multiple of it."""

_ROWS = 8
_COLUMNS = 512
_LANES = 8


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a·b + c`` with one rounding."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return c(c, c, c), codegen


@kernel
def add_low_rank(source: Any, left: Any, right: Any, scale: float, out: Any) -> None:
    """``out = source + scale · left @ right``.

    Args:
        source: ``(m, n)`` of the type of ``out``; may be ``out`` itself.
        left: ``(m, r)`` float32 or float64, ``r`` a multiple of `RANKS`.
        right: ``(r, n)`` of the same type.
        scale: float64, rounded to that type.
        out: ``(m, n)`` of the same type.
    """
    rows, columns = out.shape
    ranks = left.shape[1]
    kind = out.dtype.type
    factor = kind(scale)
    sums = np.empty((_ROWS, _COLUMNS), out.dtype)
    b = np.zeros((_ROWS, RANKS), out.dtype)
    for begin in range(0, columns, _COLUMNS):
        count = min(_COLUMNS, columns - begin)
        s0, s1, s2, s3 = sums[0, :count], sums[1, :count], sums[2, :count], sums[3, :count]
        s4, s5, s6, s7 = sums[4, :count], sums[5, :count], sums[6, :count], sums[7, :count]
        for row in range(0, rows, _ROWS):
            height = min(_ROWS, rows - row)
            sums[:] = 0
            for rank in range(0, ranks, RANKS):
                for i in range(height):
                    for k in range(RANKS):
                        b[i, k] = left[row + i, rank + k]
                b00, b01, b02, b03 = b[0, 0], b[0, 1], b[0, 2], b[0, 3]
                b10, b11, b12, b13 = b[1, 0], b[1, 1], b[1, 2], b[1, 3]
                b20, b21, b22, b23 = b[2, 0], b[2, 1], b[2, 2], b[2, 3]
                b30, b31, b32, b33 = b[3, 0], b[3, 1], b[3, 2], b[3, 3]
                b40, b41, b42, b43 = b[4, 0], b[4, 1], b[4, 2], b[4, 3]
                b50, b51, b52, b53 = b[5, 0], b[5, 1], b[5, 2], b[5, 3]
                b60, b61, b62, b63 = b[6, 0], b[6, 1], b[6, 2], b[6, 3]
                b70, b71, b72, b73 = b[7, 0], b[7, 1], b[7, 2], b[7, 3]
                a0 = right[rank, begin : begin + count]
                a1 = right[rank + 1, begin : begin + count]
                a2 = right[rank + 2, begin : begin + count]
                a3 = right[rank + 3, begin : begin + count]
                for j in range(count):
                    w, x, y, z = a0[j], a1[j], a2[j], a3[j]
                    s0[j] = _fma(b03, z, _fma(b02, y, _fma(b01, x, _fma(b00, w, s0[j]))))
                    s1[j] = _fma(b13, z, _fma(b12, y, _fma(b11, x, _fma(b10, w, s1[j]))))
                    s2[j] = _fma(b23, z, _fma(b22, y, _fma(b21, x, _fma(b20, w, s2[j]))))
                    s3[j] = _fma(b33, z, _fma(b32, y, _fma(b31, x, _fma(b30, w, s3[j]))))
                    s4[j] = _fma(b43, z, _fma(b42, y, _fma(b41, x, _fma(b40, w, s4[j]))))
                    s5[j] = _fma(b53, z, _fma(b52, y, _fma(b51, x, _fma(b50, w, s5[j]))))
                    s6[j] = _fma(b63, z, _fma(b62, y, _fma(b61, x, _fma(b60, w, s6[j]))))
                    s7[j] = _fma(b73, z, _fma(b72, y, _fma(b71, x, _fma(b70, w, s7[j]))))
            for i in range(height):
                origin = source[row + i, begin : begin + count]
                target = out[row + i, begin : begin + count]
                total = sums[i, :count]
                for j in range(count):
                    target[j] = _fma(factor, total[j], origin[j])


@kernel
def normed_rows(values: Any, magnitudes: Any) -> None:
    """Give every row a length: ``values[i] *= magnitudes[i] / ‖values[i]‖``.

    Args:
        values: ``(m, n)``, changed in place.
        magnitudes: ``(m,)`` of the same type.
    """
    lanes = np.zeros(_LANES, np.float64)
    for i in range(values.shape[0]):
        lanes[:] = 0.0
        row = values[i]
        whole = row.size // _LANES * _LANES
        for j in range(0, whole, _LANES):
            for lane in range(_LANES):
                lanes[lane] += np.float64(row[j + lane]) * np.float64(row[j + lane])
        for j in range(whole, row.size):
            lanes[j - whole] += np.float64(row[j]) * np.float64(row[j])
        total = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + (
            (lanes[1] + lanes[5]) + (lanes[3] + lanes[7])
        )
        factor = values.dtype.type(np.float64(magnitudes[i]) / np.sqrt(total))
        for j in range(row.size):
            row[j] *= factor


@kernel
def column_squares(values: Any, out: Any) -> None:
    """Add the squares of every column, first row to last: ``out[j] += Σᵢ values[i, j]²``.

    Args:
        values: ``(m, n)``.
        out: ``(n,)`` float64.
    """
    for i in range(values.shape[0]):
        row = values[i]
        for j in range(row.size):
            out[j] += np.float64(row[j]) * np.float64(row[j])


@kernel
def normed_columns(values: Any, factors: Any) -> None:
    """``values[i, j] *= factors[j]``.

    Args:
        values: ``(m, n)``, changed in place.
        factors: ``(n,)`` of the same type.
    """
    for i in range(values.shape[0]):
        row = values[i]
        for j in range(row.size):
            row[j] *= factors[j]
