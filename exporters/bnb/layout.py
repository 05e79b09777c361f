"""NF4 in the layout that transformers saves for bitsandbytes, without double quantization.

A matrix is cut into blocks of 64 along its rows; each has its largest size in float32, and four
bits for each weight: the nearest of 16 values of a normal distribution (Dettmers et al., arXiv
2305.14314), two in a byte, the first in the upper half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

import mergekit_lite
from exporters.linears.layouts import Written
from exporters.linears.matrices import Matrix
from exporters.linears.quantized import Grid, Quantized, in_slices
from exporters.linears.rounder import LayerResult, WeightRounder, check_finite
from exporters.linears.scheme import Scheme
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import Checkpoint, TensorSpec
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels import grid

__all__ = ["Nf4Layout", "Nf4Rounder"]

_BLOCK = 64
_STATE = "weight.quant_state.bitsandbytes__nf4"


class Nf4Layout:
    """See the module.

    Args:
        dtype: torch's name of the type that weights become again: the model's.
    """

    def __init__(self, dtype: str) -> None:
        self.grid = Grid(Scheme(4, _BLOCK, True), 0, "F32")
        self._dtype = dtype

    def specs(self, matrix: Matrix) -> dict[str, TensorSpec]:
        """See `Layout`."""
        rows, columns = matrix.shape
        byte, wide = DTYPES["U8"], DTYPES["F32"]
        return {
            "weight": TensorSpec((rows * columns // 2, 1), byte),
            "weight.absmax": TensorSpec((rows * columns // _BLOCK,), wide),
            "weight.quant_map": TensorSpec((16,), wide),
            _STATE: TensorSpec((len(self._state(matrix)),), byte),
        }

    def tensors(self, matrix: Matrix, quantized: Quantized) -> dict[str, Array]:
        """See `Layout`."""
        codes = np.ascontiguousarray(quantized.codes.T).reshape(-1, 2)
        return {
            "weight": ((codes[:, 0] << 4) | codes[:, 1])[:, None],
            "weight.absmax": np.ascontiguousarray(quantized.scales.T).reshape(-1),
            "weight.quant_map": grid.NF4,
            _STATE: np.frombuffer(self._state(matrix), np.uint8),
        }

    def _state(self, matrix: Matrix) -> bytes:
        return json.dumps({
            "quant_type": "nf4", "blocksize": _BLOCK, "dtype": self._dtype,
            "shape": list(matrix.shape),
        }).encode()  # fmt: skip

    def written(
        self, left: Sequence[str], transposed: Sequence[str], details: Mapping[str, Any]
    ) -> Written:
        """See `Layout`."""
        if transposed:
            raise PackError(
                f"'{transposed[0]}' is stored with its inputs first, which is not written as NF4",
                "Use --to gptq.",
            )
        return Written(
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "_load_in_4bit": True,
                "_load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_use_double_quant": False,
                "bnb_4bit_compute_dtype": self._dtype,
                "llm_int8_skip_modules": ["lm_head", *left],
                "meta": {"quantizer": [f"pack:{mergekit_lite.__version__}"], **details},
            },
            {},
        )


class Nf4Rounder(WeightRounder):
    """Rounds to the nearest of the 16 values."""

    def details(self) -> Mapping[str, Any]:
        """See `WeightRounder`."""
        return {"method": "nf4"}

    def round(
        self, checkpoint: Checkpoint, matrices: Sequence[Matrix], threads: int
    ) -> LayerResult:
        """See `WeightRounder`."""
        result = LayerResult()
        for matrix in matrices:
            weights = read_float(checkpoint, matrix.tensor).astype(np.float32, copy=False)
            check_finite(matrix, weights)
            laid = np.ascontiguousarray(weights.T)
            columns, rows = laid.shape
            scales = np.empty((columns // _BLOCK, rows), np.float32)
            codes = np.empty(laid.shape, np.uint8)
            work = partial(grid.nearest, laid, grid.NF4, _BLOCK, scales, codes)
            in_slices(work, rows, columns, threads)
            group_of = (np.arange(columns) // _BLOCK).astype(np.int32)
            zeros = np.zeros(scales.shape, np.uint8)
            result.quantized[matrix.tensor] = Quantized(codes, scales, zeros, group_of)
        return result
