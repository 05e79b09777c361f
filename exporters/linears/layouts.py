"""How a matrix on a grid lies in a file, and what the config says of it.

Formats: GPTQ (AutoGPTQ's version 1 and gptqmodel's version 2), AWQ's GEMM (AutoAWQ, eight
weights of a word in the order 0 2 4 6 1 3 5 7), and compressed-tensors' ``pack-quantized`` and
``int-quantized`` (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import mergekit_lite
from exporters.linears.matrices import Matrix
from exporters.linears.quantized import Grid, Quantized
from exporters.linears.scheme import Scheme
from mergekit_lite.checkpoint.protocol import TensorSpec
from mergekit_lite.checkpoint.quantized import AWQ_ORDER
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.bits import pack, words_of
from mergekit_lite.kernels.cast import encode

__all__ = ["AwqLayout", "CompressedLayout", "GptqLayout", "Layout", "Written"]

_I32, _F16, _I64, _I8 = DTYPES["I32"], DTYPES["F16"], DTYPES["I64"], DTYPES["I8"]
_PRODUCER = f"pack:{mergekit_lite.__version__}"


@dataclass(frozen=True)
class Written:
    """What a config says of a whole model.

    Attributes:
        config: ``quantization_config`` of config.json.
        files: Further files, by name.
    """

    config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]


class Layout(Protocol):
    """A format."""

    grid: Grid

    def specs(self, matrix: Matrix) -> dict[str, TensorSpec]:
        """Shape and dtype of what a matrix becomes, by the last part of its name."""

    def tensors(self, matrix: Matrix, quantized: Quantized) -> dict[str, Array]:
        """The same with their contents."""

    def written(
        self, left: Sequence[str], transposed: Sequence[str], details: Mapping[str, Any]
    ) -> Written:
        """What the config says.

        Args:
            left: Linear layers that are not quantized.
            transposed: Names of tensors that the model stores as ``(in, out)``.
            details: How it was computed.
        """


def _half(values: Array) -> Array:
    return values.astype("<f2")


class GptqLayout:
    """GPTQ: version 1, whose zero points are stored less one, for symmetric grids.

    Asymmetric ones are version 2: gptqmodel refuses version 1 with zero points by any producer but
    itself, since AutoGPTQ wrote wrong ones.

    Args:
        scheme: Of the weights.
        by_activation: Whether groups are formed in the order of activations (``desc_act``).
    """

    def __init__(self, scheme: Scheme, by_activation: bool) -> None:
        self._less = 1 if scheme.symmetric else 0
        self.grid = Grid(scheme, least_zero=self._less)
        self._by_activation = by_activation

    def specs(self, matrix: Matrix) -> dict[str, TensorSpec]:
        """See `Layout`."""
        rows, columns = matrix.shape
        bits = self.grid.scheme.bits
        groups = columns // self.grid.scheme.size(columns)
        return {
            "qweight": TensorSpec((words_of(columns, bits), rows), _I32),
            "qzeros": TensorSpec((groups, words_of(rows, bits)), _I32),
            "scales": TensorSpec((groups, rows), _F16),
            "g_idx": TensorSpec((columns,), _I32),
        }

    def tensors(self, matrix: Matrix, quantized: Quantized) -> dict[str, Array]:
        """See `Layout`."""
        bits = self.grid.scheme.bits
        less = quantized.zeros - np.uint8(self._less)
        return {
            "qweight": pack(quantized.codes, bits),
            "qzeros": np.ascontiguousarray(pack(np.ascontiguousarray(less.T), bits).T),
            "scales": _half(quantized.scales),
            "g_idx": quantized.group_of,
        }

    def written(
        self, left: Sequence[str], transposed: Sequence[str], details: Mapping[str, Any]
    ) -> Written:
        """See `Layout`."""
        scheme = self.grid.scheme
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
            "bits": scheme.bits,
            "group_size": scheme.group or -1,
            "sym": scheme.symmetric,
            "desc_act": self._by_activation,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": [_PRODUCER], **details},
        }
        if left:  # what gptqmodel and vLLM know modules by that are left out
            config["dynamic"] = {rf"-:^{name.replace('.', chr(92) + '.')}$": {} for name in left}
        if transposed:
            config["meta"]["transposed"] = list(transposed)
        return Written(config, {"quantize_config.json": config})


class AwqLayout:
    """AWQ's GEMM.

    Args:
        scheme: Of the weights.

    Raises:
        PackError: The format has no such scheme.
    """

    def __init__(self, scheme: Scheme) -> None:
        if scheme.bits != 4 or scheme.group is None:
            raise PackError(
                f"AWQ's own format has 4 bits and groups, not w{scheme.bits}"
                f"{'' if scheme.group is None else f'g{scheme.group}'}",
                "Add --format compressed-tensors, or choose w4g128.",
            )
        self.grid = Grid(scheme)

    def specs(self, matrix: Matrix) -> dict[str, TensorSpec]:
        """See `Layout`."""
        rows, columns = matrix.shape
        groups = columns // self.grid.scheme.size(columns)
        return {
            "qweight": TensorSpec((columns, rows // 8), _I32),
            "qzeros": TensorSpec((groups, rows // 8), _I32),
            "scales": TensorSpec((groups, rows), _F16),
        }

    def tensors(self, matrix: Matrix, quantized: Quantized) -> dict[str, Array]:
        """See `Layout`."""
        return {
            "qweight": _in_awq_order(quantized.codes),
            "qzeros": _in_awq_order(quantized.zeros),
            "scales": _half(quantized.scales),
        }

    def written(
        self, left: Sequence[str], transposed: Sequence[str], details: Mapping[str, Any]
    ) -> Written:
        """See `Layout`."""
        config: dict[str, Any] = {
            "quant_method": "awq",
            "version": "gemm",
            "checkpoint_format": "gemm",
            "bits": 4,
            "group_size": self.grid.scheme.group,
            "zero_point": True,
            "modules_to_not_convert": ["lm_head", *left],
            "meta": {"quantizer": [_PRODUCER], **details},
        }
        if transposed:
            config["meta"]["transposed"] = list(transposed)
        return Written(config, {})


def _in_awq_order(codes: Array) -> Array:
    """Pack the last dimension eight to a word, in AWQ's order."""
    count, rows = codes.shape
    eights = codes.reshape(count, rows // 8, 8)[:, :, list(AWQ_ORDER)].astype(np.uint32)
    shifts = (np.arange(8, dtype=np.uint32) * 4).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(eights << shifts, axis=2).astype(np.uint32)
    return words.view(np.int32)


class CompressedLayout:
    """compressed-tensors: packed, or whole bytes for weights of 8 bits with activations of 8.

    Args:
        scheme: Of the weights.
        dtype: Safetensors' name of the type of scales: the model's.
        by_activation: Whether groups are formed in the order of activations.
        activations: Whether inputs are rounded to 8 bits too, token by token, when it runs.
    """

    def __init__(
        self,
        scheme: Scheme,
        dtype: str,
        by_activation: bool = False,
        activations: bool = False,
    ) -> None:
        self.grid = Grid(scheme, 0, dtype if dtype in ("F16", "BF16") else "F32")
        self._by_activation = by_activation
        self._activations = activations

    def specs(self, matrix: Matrix) -> dict[str, TensorSpec]:
        """See `Layout`."""
        rows, columns = matrix.shape
        scheme = self.grid.scheme
        groups = columns // scheme.size(columns)
        scales = TensorSpec((rows, groups), DTYPES[self.grid.scale_dtype])
        if self._activations:
            return {"weight": TensorSpec((rows, columns), _I8), "weight_scale": scales}
        found = {
            "weight_packed": TensorSpec((rows, words_of(columns, scheme.bits)), _I32),
            "weight_scale": scales,
            "weight_shape": TensorSpec((2,), _I64),
        }
        if not scheme.symmetric:
            shape = words_of(rows, scheme.bits), groups
            found["weight_zero_point"] = TensorSpec(shape, _I32)
        if self._by_activation:
            found["weight_g_idx"] = TensorSpec((columns,), _I32)
        return found

    def tensors(self, matrix: Matrix, quantized: Quantized) -> dict[str, Array]:
        """See `Layout`."""
        scheme = self.grid.scheme
        dtype = DTYPES[self.grid.scale_dtype]
        scales = np.empty(quantized.scales.size, dtype.storage)
        encode(np.ascontiguousarray(quantized.scales.T).reshape(-1), dtype, scales)
        scales = scales.reshape(quantized.scales.shape[::-1])
        if self._activations:
            signed = (quantized.codes.T.astype(np.int16) - scheme.middle).astype(np.int8)
            return {"weight": np.ascontiguousarray(signed), "weight_scale": scales}
        packed = pack(quantized.codes, scheme.bits)
        found = {
            "weight_packed": np.ascontiguousarray(packed.T),
            "weight_scale": scales,
            "weight_shape": np.array(matrix.shape, np.int64),
        }
        if not scheme.symmetric:
            zeros = np.ascontiguousarray(quantized.zeros.T)
            found["weight_zero_point"] = pack(zeros, scheme.bits)
        if self._by_activation:
            found["weight_g_idx"] = quantized.group_of
        return found

    def written(
        self, left: Sequence[str], transposed: Sequence[str], details: Mapping[str, Any]
    ) -> Written:
        """See `Layout`."""
        scheme = self.grid.scheme
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group is None else "group",
            "group_size": scheme.group,
            "dynamic": False,
            "actorder": "group" if self._by_activation else None,
        }
        inputs = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        }  # fmt: skip
        kind = "int-quantized" if self._activations else "pack-quantized"
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": inputs if self._activations else None,
                    "output_activations": None,
                    "format": kind,
                }
            },
            "ignore": ["lm_head", *left],
            "kv_cache_scheme": None,
        }
        if transposed:
            raise PackError(
                f"'{transposed[0]}' is stored with its inputs first, which compressed-tensors "
                "does not know",
                "Use --format gptq.",
            )
        return Written(config, {})
