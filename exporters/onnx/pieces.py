"""Initializers of a graph, and what makes their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exporters.linears.quantized import Quantized
from exporters.onnx.deferred import Deferred, Read
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.cast import encode

__all__ = ["Piece", "as_blocks", "float_piece", "gathered_blocks", "whole_bytes"]


@dataclass(frozen=True)
class Piece:
    """Initializers that are made together.

    Attributes:
        names: Of the initializers.
        make: Gives their content in that order, of their types and shapes; bfloat16 as uint16.
        elements: Weights of the model that they stand for, for the progress shown.
    """

    names: tuple[str, ...]
    make: Callable[[Read], Sequence[Array]]
    elements: int


_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def float_piece(name: str, weight: Deferred, kind: str) -> Piece:
    """Floating point as it is, or rounded to a smaller type.

    Args:
        name: Of the initializer.
        weight: Its values.
        kind: ``float32``, ``float16`` or ``bfloat16``.
    """

    def make(read: Read) -> list[Array]:
        found = weight.read(read)
        if not found.is_floating_point():
            return [np.ascontiguousarray(found.numpy())]
        values = np.ascontiguousarray(found.float().numpy())
        if kind == "float32":
            return [values]
        dtype = DTYPES[_KINDS[kind]]
        out = np.empty(values.size, dtype.storage)
        encode(values.reshape(-1), dtype, out)
        if kind == "float16" and not np.isfinite(out.view(np.float16)).all():
            raise PackError(
                f"'{name}' has values that float16 cannot hold",
                "Choose bf16, or fp32.",
            )
        return [out.reshape(values.shape)]

    return Piece((name,), make, weight.numel())


def as_blocks(held: Sequence[Quantized], bits: int, zeros: bool) -> list[Array]:
    """Codes as MatMulNBits of onnxruntime has them.

    Source: onnxruntime, ContribOperators.md, com.microsoft.MatMulNBits: of a matrix ``(N, K)``,
    blocks along K, the first code in the low bits; a zero point of 4 bits is packed likewise.

    Args:
        held: Rows of the matrix, one part below the other; groups are blocks.
        bits: 4 or 8.
        zeros: Whether zero points are written; else they are the middle of the codes.

    Returns:
        Codes ``(N, blocks, bytes)`` uint8, scales ``(N, blocks)`` float32 and, if wanted, zero
        points ``(N, bytes)`` uint8.
    """
    codes = np.concatenate([part.codes.T for part in held])
    scales = np.concatenate([part.scales.T for part in held])
    count = scales.shape[1]
    found = [
        _nibbles(codes).reshape(len(codes), count, -1) if bits == 4
        else np.ascontiguousarray(codes).reshape(len(codes), count, -1),
        np.ascontiguousarray(scales, np.float32),
    ]  # fmt: skip
    if zeros:
        points = np.concatenate([part.zeros.T for part in held])
        found.append(_nibbles(points) if bits == 4 else np.ascontiguousarray(points))
    return found


def gathered_blocks(arrays: Sequence[Array]) -> list[Array]:
    """The same for GatherBlockQuantized: codes are ``(N, K)`` or, of 4 bits, ``(N, K/2)``."""
    return [arrays[0].reshape(len(arrays[0]), -1), *arrays[1:]]


def _nibbles(codes: Array) -> Array:
    """Two codes in a byte, along the last dimension."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.ascontiguousarray(codes[:, ::2] | (codes[:, 1::2] << 4))


def whole_bytes(rows: Array) -> tuple[Array, Array]:
    """Rows of weights ``(N, K)`` as uint8 around 128, with a scale for each row.

    Both operands of an integer product are then unsigned: products of unsigned with signed bytes
    overflow 16 bits on x86 processors without VNNI.

    Returns:
        Codes ``(N, K)`` uint8 and scales ``(N,)`` float32.
    """
    most = np.abs(rows).max(axis=1)
    scales = np.where(most > 0, most / np.float32(127), np.float32(1)).astype(np.float32)
    codes = np.rint(rows / scales[:, None]) + 128
    return codes.astype(np.uint8), scales
