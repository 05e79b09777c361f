"""A matrix of weights on a grid, and the grids that plain rounding gives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from exporters.linears.scheme import Scheme
from mergekit_lite.dtypes import Array
from mergekit_lite.kernels import grid

__all__ = ["DIGITS", "STEPS", "Grid", "Quantized", "in_slices", "rounded"]

STEPS = 12
"""First scales that a search tries."""

DIGITS = {"F16": 10, "BF16": 7, "F32": 23}
"""Binary digits of a scale, by the type that it is stored in."""

_LEAST_WORK = 1 << 18


@dataclass(frozen=True)
class Grid:
    """What may stand in a file.

    Attributes:
        scheme: Bits, group, symmetry.
        least_zero: Smallest zero point that the format has.
        scale_dtype: Type of a stored scale.
    """

    scheme: Scheme
    least_zero: int = 0
    scale_dtype: str = "F16"

    @property
    def digits(self) -> int:
        """Binary digits of a scale."""
        return DIGITS[self.scale_dtype]


@dataclass(frozen=True)
class Quantized:
    """A matrix of weights ``(out, in)`` on a grid, laid out with its inputs first.

    Attributes:
        codes: ``(in, out)`` uint8.
        scales: ``(groups, out)`` float32, as they are stored.
        zeros: ``(groups, out)`` uint8.
        group_of: ``(in,)`` int32, the group of each input.
    """

    codes: Array
    scales: Array
    zeros: Array
    group_of: Array

    def values(self) -> Array:
        """The weights ``(out, in)`` float32 that it stands for; columns lie side by side."""
        out = np.empty(self.codes.shape, np.float32)
        grid.dequantize(
            self.codes, self.scales, self.zeros, self.group_of, out, 0, self.codes.shape[1]
        )
        return out.T

    @property
    def in_order(self) -> bool:
        """Whether groups are inputs that follow one another."""
        size = len(self.group_of) // len(self.scales)
        return bool((self.group_of == np.arange(len(self.group_of)) // size).all())


def in_slices(work: Callable[[int, int], None], rows: int, columns: int, threads: int) -> None:
    """Do work on ranges of rows on several threads.

    Args:
        work: Gets the first row and one past the last.
        rows: Number of rows; cut at multiples of the kernels' lanes.
        columns: Of a row, to tell what is worth a thread.
        threads: At most.
    """
    lanes = -(-rows // grid.LANES)
    parts = max(1, min(threads, lanes, rows * columns // _LEAST_WORK))
    cuts = [min(rows, grid.LANES * (lanes * part // parts)) for part in range(parts + 1)]
    cuts[-1] = rows
    if parts == 1:
        work(0, rows)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, cuts[:-1], cuts[1:]))


def rounded(
    weights: Array, importance: Array | None, kind: Grid, threads: int, steps: int = STEPS
) -> Quantized:
    """Round weights to the nearest code, with scales that lose least.

    Args:
        weights: ``(in, out)`` float32.
        importance: ``(in,)`` float32, of a column's squared error; None for all alike.
        kind: Of the grid.
        threads: Worker threads.
        steps: First scales that are tried; 0 for the range of the weights as it is.
    """
    columns, rows = weights.shape
    scheme = kind.scheme
    size = scheme.size(columns)
    scales = np.empty((columns // size, rows), np.float32)
    lows = np.empty_like(scales)
    codes = np.empty((columns, rows), np.uint8)
    group_of = (np.arange(columns) // size).astype(np.int32)
    weight = np.ones(columns, np.float32) if importance is None else importance

    def work(begin: int, end: int) -> None:
        grid.fit(weights, weight, size, scheme.top, scheme.symmetric, kind.least_zero, steps,
                 kind.digits, scales, lows, begin, end)  # fmt: skip
        grid.round_to(weights, group_of, scales, lows, scheme.top, codes, begin, end)

    in_slices(work, rows, columns, threads)
    return Quantized(codes, scales, (-lows).astype(np.uint8), group_of)
