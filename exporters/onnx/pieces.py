"""Initializers of a graph, and what makes their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.linears.quantized import Quantized
from exporters.onnx.deferred import Deferred, Read
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["Piece", "as_blocks", "float_piece", "whole_bytes"]


_SLICE = 1 << 22
"""Elements that are converted at a time."""


@dataclass(frozen=True)
class Piece:
    """Initializers that are made together.

    Attributes:
        names: Of the initializers.
        make: Gives the content of each in that order: arrays that follow one another in the file,
            of the initializer's type, bfloat16 as int16.
        elements: Weights of the model that they stand for, for the progress shown.
    """

    names: tuple[str, ...]
    make: Callable[[Read], Sequence[Iterable[Array]]]
    elements: int


def float_piece(name: str, weight: Deferred, kind: str) -> Piece:
    """Floating point as it is, or rounded to a smaller type.

    Args:
        name: Of the initializer.
        weight: Its values.
        kind: ``float32``, ``float16`` or ``bfloat16``.
    """
    return Piece((name,), lambda read: [_parts(name, weight.read(read), kind)], weight.numel())


def _parts(name: str, values: Any, kind: str) -> Iterator[Array]:
    """A tensor in slices of its first dimension, each laid out as a file has it.

    Raises:
        PackError: A value is too large for float16.
    """
    import torch

    if not values.is_floating_point():
        yield np.ascontiguousarray(values.numpy())
        return
    if values.ndim == 0:
        values = values.reshape(1)
    step = max(1, _SLICE // max(1, values[:1].numel()))
    for start in range(0, len(values), step):
        part = values[start : start + step]
        if part.ndim == 2 and not part.is_contiguous():  # torch turns whole matrices fast
            part = part.t().contiguous().t()
        part = part.to(getattr(torch, kind)).contiguous()
        if kind == "float16" and not bool(torch.isfinite(part).all()):
            raise PackError(
                f"'{name}' has values that float16 cannot hold", "Choose bf16, or fp32."
            )
        yield part.view(torch.int16).numpy() if kind == "bfloat16" else part.numpy()


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
        Codes ``(K, N)`` uint8 and scales ``(N,)`` float32.
    """
    codes = np.empty(rows.shape[::-1], np.uint8)
    scales = np.empty(len(rows), np.float32)
    step = max(1, _SLICE // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        most = np.maximum(part.max(axis=1), -part.min(axis=1))
        scale = np.where(most > 0, most / np.float32(127), np.float32(1)).astype(np.float32)
        scales[start : start + step] = scale
        found = part / scale[:, None]
        np.rint(found, out=found)
        found += 128
        codes[:, start : start + step] = found.astype(np.uint8).T
    return codes, scales
