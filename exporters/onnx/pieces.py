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
        weight: Name of the weight in the graph as it was built.
        whole: Gives the content of floats in one array, which is faster than in several.
    """

    names: tuple[str, ...]
    make: Callable[[Read], Sequence[Iterable[Array]]]
    elements: int
    weight: str
    whole: Callable[[Read], Array] | None = None


def float_piece(name: str, weight: Deferred, kind: str) -> Piece:
    """Floating point as it is, or rounded to a smaller type.

    Args:
        name: Of the initializer.
        weight: Its values.
        kind: ``float32``, ``float16`` or ``bfloat16``.
    """
    return Piece(
        (name,), lambda read: [_parts(name, weight.read(read), kind)], weight.numel(), name,
        lambda read: _converted(name, weight.read(read), kind),
    )  # fmt: skip


def _parts(name: str, values: Any, kind: str) -> Iterator[Array]:
    """A tensor in slices of its first dimension, each laid out as a file has it."""
    if not values.is_floating_point() or values.ndim == 0:
        yield _converted(name, values, kind)
        return
    step = max(1, _SLICE // max(1, values[:1].numel()))
    for start in range(0, len(values), step):
        part = values[start : start + step]
        if part.ndim == 2 and not part.is_contiguous():  # torch turns whole matrices fast
            part = part.t().contiguous().t()
        yield _converted(name, part, kind)


def _converted(name: str, values: Any, kind: str) -> Array:
    """A tensor of torch's as a file has it.

    Raises:
        PackError: A value is too large for float16.
    """
    import torch

    if not values.is_floating_point():
        return np.ascontiguousarray(values.numpy())
    values = values.to(getattr(torch, kind)).contiguous()
    if kind == "float16" and not bool(torch.isfinite(values).all()):
        raise PackError(f"'{name}' has values that float16 cannot hold", "Choose bf16, or fp32.")
    found: Array = (values.view(torch.int16) if kind == "bfloat16" else values).numpy()
    return found


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
