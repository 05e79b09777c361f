"""What an adapter does to one tensor of its base, computed for some rows at a time.

An `Edit` changes rows of the base in place. Those of one adapter on one tensor form a chain, each
working on what the one before it left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mergekit_lite.adapters.tensors import AdapterTensors
from mergekit_lite.checkpoint.protocol import Rows, TensorSpec
from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.lowrank import (
    RANKS,
    add_low_rank,
    column_squares,
    normed_columns,
    normed_rows,
)

__all__ = ["AddedBias", "Computed", "Edit", "Factors", "LowRank", "Replaced", "ReplacedRows"]


class Edit:
    """One change of one tensor; safe to call from several threads."""

    passes: int = 0

    def observe(self, rows: Rows, values: Array) -> None:
        """See rows of what it will change, ``(rows, columns)``, where it has a pass."""

    def settle(self) -> None:
        """Finish the pass."""

    def apply(self, rows: Rows, values: Array) -> None:
        """Change rows in place, ``(rows, columns)`` of the working type."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True)
class Factors:
    """Where the two factors of a low-rank change are found, and how they lie.

    The change of a weight ``(out, in)`` is ``scale · B @ A`` with ``A`` ``(rank, in)`` and ``B``
    ``(out, rank)``.

    Attributes:
        a: Name of the tensor that holds A.
        b: Name of the tensor that holds B.
        scale: What the product is multiplied by.
        transposed: Whether the weight is stored as ``(in, out)``: Conv1D layers, embeddings, and
            experts of some models.
        experts: Number of experts whose factors lie in the same two tensors: A is
            ``(experts·rank, in)``, expert by expert, B is ``(out, rank·experts)``, rank by rank.
        expert: The one that is meant; None for all, one below the other.
        part: First and one past the last row of the stored weight, where the tensor is a part of
            what was adapted; None for all.
    """

    a: str
    b: str
    scale: float
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    part: tuple[int, int] | None = None

    def load(self, tensors: AdapterTensors, work: np.dtype[Any]) -> tuple[Array, Array]:
        """Read both factors.

        Returns:
            ``left`` ``(experts, rows, rank)`` and ``right`` ``(experts, rank, columns)``, whose
            products are rows of the stored weight; the rank is padded with zeros for the kernel.
        """
        a = tensors.matrix(self.a)
        b = tensors.matrix(self.b)
        a = a.reshape(self.experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, self.experts).transpose(2, 0, 1)
        if self.expert is not None:
            a, b = a[self.expert : self.expert + 1], b[self.expert : self.expert + 1]
        left, right = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.transposed else (b, a)
        if self.part is not None:
            left = left[:, slice(*self.part)]
        padding = -left.shape[2] % RANKS
        return (
            np.ascontiguousarray(np.pad(left, ((0, 0), (0, 0), (0, padding))), work),
            np.ascontiguousarray(np.pad(right, ((0, 0), (0, padding), (0, 0))), work),
        )


class LowRank(Edit):
    """Adds the product of two factors; with DoRA, then gives each output its trained length.

    Source: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, equation 5.
    """

    def __init__(
        self,
        factors: Factors,
        tensors: AdapterTensors,
        spec: TensorSpec,
        work: np.dtype[Any],
        magnitude: str | None = None,
        along: Literal["rows", "columns"] = "rows",
    ) -> None:
        self._factors = factors
        self._tensors = tensors
        self._work = work
        self._magnitude = magnitude
        self._along = along
        self._columns = spec.columns
        self._lock = threading.Lock()
        self._loaded: tuple[Array, Array] | None = None
        self._squares: dict[int, Array] = {}
        self._lengths: Array | None = None
        self.passes = 1 if magnitude is not None and along == "columns" else 0

    @property
    def linear(self) -> bool:
        """Whether it only adds, whatever the base is."""
        return self._magnitude is None

    def add(self, rows: Rows, source: Array, values: Array, weight: float) -> None:
        """Write the source and the low-rank change, times a weight, into ``values``."""
        left, right = self._load()
        height = left.shape[1]
        row = rows.start
        while row < rows.stop:
            expert = row // height
            stop = min(rows.stop, (expert + 1) * height)
            part = slice(row - rows.start, stop - rows.start)
            add_low_rank(
                source[part],
                left[expert, row - expert * height : stop - expert * height],
                right[expert],
                weight * self._factors.scale,
                values[part],
            )
            row = stop

    def observe(self, rows: Rows, values: Array) -> None:
        """Sum squares of the columns of the changed weight, chunk by chunk."""
        self.add(rows, values, values, 1.0)
        squares = np.zeros(self._columns, np.float64)
        column_squares(values, squares)
        with self._lock:
            self._squares[rows.start] = squares

    def settle(self) -> None:
        """Turn the sums into the factors of the columns; chunks are added in their order."""
        if not self.passes:
            return
        total = np.zeros(self._columns, np.float64)
        for start in sorted(self._squares):
            total += self._squares[start]
        self._squares.clear()
        magnitude = self._tensors.vector(str(self._magnitude)).astype(np.float64)
        self._lengths = (magnitude / np.sqrt(total)).astype(self._work)

    def apply(self, rows: Rows, values: Array) -> None:
        """Add the change, and set lengths."""
        self.add(rows, values, values, 1.0)
        if self._magnitude is None:
            return
        if self._along == "columns":
            normed_columns(values, self._lengths)
        else:
            if self._lengths is None:
                self._lengths = self._tensors.vector(self._magnitude).astype(self._work)
            normed_rows(values, self._lengths[rows.start : rows.stop])

    def close(self) -> None:
        """Let go of the factors."""
        self._loaded = None

    def _load(self) -> tuple[Array, Array]:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._factors.load(self._tensors, self._work)
            return self._loaded


class Replaced(Edit):
    """Puts a tensor that the adapter carries whole in the place of the base's."""

    def __init__(self, name: str, tensors: AdapterTensors) -> None:
        self._name = name
        self._tensors = tensors

    def apply(self, rows: Rows, values: Array) -> None:
        """Read the rows from the adapter."""
        self._tensors.rows(self._name, rows, values)


class ReplacedRows(Edit):
    """Puts trained rows of an embedding in their places."""

    def __init__(self, name: str, indices: tuple[int, ...], tensors: AdapterTensors) -> None:
        self._name = name
        self._indices = np.array(indices, np.int64)
        self._tensors = tensors

    def apply(self, rows: Rows, values: Array) -> None:
        """Copy those that lie in the range."""
        here = (self._indices >= rows.start) & (self._indices < rows.stop)
        if here.any():
            trained = self._tensors.matrix(self._name)
            values[self._indices[here] - rows.start] = trained[here]


class AddedBias(Edit):
    """Adds the bias of the second factor to that of the layer."""

    def __init__(self, name: str, scale: float, tensors: AdapterTensors) -> None:
        self._name = name
        self._scale = scale
        self._tensors = tensors

    def apply(self, rows: Rows, values: Array) -> None:
        """Add it, scaled."""
        bias = self._tensors.vector(self._name)[rows.start : rows.stop]
        values += (values.dtype.type(self._scale) * bias.astype(values.dtype))[:, None]


class Computed(Edit):
    """Puts a tensor that can only be computed as a whole in the place of the base's.

    It is computed when its first rows are asked for, and held until the tensor is closed.
    """

    def __init__(self, compute: Callable[[], Array], spec: TensorSpec) -> None:
        self._compute = compute
        self._shape = (spec.rows, spec.columns)
        self._lock = threading.Lock()
        self._whole: Array | None = None

    def apply(self, rows: Rows, values: Array) -> None:
        """Copy rows of the computed tensor."""
        with self._lock:
            if self._whole is None:
                self._whole = self._compute().reshape(self._shape)
            whole = self._whole
        values[:] = whole[rows.start : rows.stop]

    def close(self) -> None:
        """Let go of the tensor."""
        self._whole = None
