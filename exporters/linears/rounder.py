"""What decides how the matrices of a layer are rounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from exporters.linears.matrices import Matrix
from exporters.linears.quantized import Grid, Quantized, rounded
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import LayerRun

__all__ = [
    "FEWEST_TOKENS", "LayerResult", "PlainRounder", "Rounder", "Stored", "WeightRounder",
    "check_finite",
]  # fmt: skip

FEWEST_TOKENS = 128
"""Below so many, inputs tell too little of what matters."""

Stored = Callable[[str, Any], Any]
"""A parameter of a layer, by its path below it, after it has been in the file of the result."""


@dataclass
class LayerResult:
    """A rounded layer.

    Attributes:
        quantized: By name of the tensor.
        changed: Parameters of the layer that are no matrices and changed: float32, by path.
        notes: What the user should know.
    """

    quantized: dict[str, Quantized] = field(default_factory=dict)
    changed: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Rounder(Protocol):
    """A method that looks at activations."""

    def details(self) -> Mapping[str, Any]:
        """Settings, for config and lock."""

    def round(
        self,
        index: int,
        layer: Any,
        run: LayerRun,
        matrices: Sequence[Matrix],
        stored: Stored,
    ) -> LayerResult:
        """Round the matrices of a layer.

        Args:
            index: Number of the layer.
            layer: Filled; left as the result computes.
            run: Runs the calibration text through it.
            matrices: All that are to be rounded.
            stored: Rounds what stays a float as the file will hold it.
        """


class WeightRounder(ABC):
    """A method that looks at weights alone."""

    @abstractmethod
    def details(self) -> Mapping[str, Any]:
        """Settings, for config and lock."""

    @abstractmethod
    def round(
        self, checkpoint: Checkpoint, matrices: Sequence[Matrix], threads: int
    ) -> LayerResult:
        """Round matrices as they are read, on so many threads."""


class PlainRounder(WeightRounder):
    """Rounds to the nearest code, with scales that lose least; looks at weights alone.

    Args:
        grid: Of the codes.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def details(self) -> Mapping[str, Any]:
        """See `Rounder`."""
        return {"method": "rtn"}

    def round(
        self, checkpoint: Checkpoint, matrices: Sequence[Matrix], threads: int
    ) -> LayerResult:
        """Round matrices as they are read, on so many threads."""
        result = LayerResult()
        for matrix in matrices:
            weights = read_float(checkpoint, matrix.tensor).astype(np.float32, copy=False)
            check_finite(matrix, weights)
            laid = weights if matrix.transposed else weights.T
            result.quantized[matrix.tensor] = rounded(
                np.ascontiguousarray(laid), None, self._grid, threads
            )
        return result


def check_finite(matrix: Matrix, weights: Array) -> None:
    """Refuse weights that have no nearest code.

    Raises:
        PackError: They hold NaN or infinity.
    """
    if not np.isfinite(weights).all():
        raise PackError(
            f"'{matrix.tensor}' holds NaN or infinity", "Quantize a model whose weights are finite."
        )
