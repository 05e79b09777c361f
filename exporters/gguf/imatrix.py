"""Importance matrices: how much the squared inputs of each column weigh, from llama-imatrix.

Two forms: GGUF with a pair ``NAME.in_sum2`` and ``NAME.counts`` for each tensor (since 2025), and
the older one, a list of names with sums. Source: tools/imatrix and load_imatrix of llama.cpp.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import FileFormatError

__all__ = ["read_imatrix"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1 << 10


def read_imatrix(path: Path) -> dict[str, Array]:
    """Read an importance matrix.

    Returns:
        By name of the weight in GGUF, float32: ``(columns,)``, or ``(experts, columns)``.

    Raises:
        FileFormatError: The file is no importance matrix, or holds NaN, infinity or negatives.
    """
    with path.open("rb") as file:
        found = _of_gguf(path) if file.read(4) == b"GGUF" else _of_list(path)
    if not found:
        raise FileFormatError(f"{path}: holds no importance of any tensor", "Make it again.")
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise FileFormatError(
                f"{path}: the importance of '{name}' holds NaN, infinity or negative numbers",
                "Make it again.",
            )
    return found


def _of_gguf(path: Path) -> dict[str, Array]:
    checkpoint = GgufCheckpoint(path)
    try:
        found: dict[str, Array] = {}
        for name in checkpoint.names():
            if not name.endswith(_SUMS):
                continue
            weight = name.removesuffix(_SUMS)
            if weight + _COUNTS not in checkpoint.names():
                raise FileFormatError(f"{path}: lacks '{weight}{_COUNTS}'", "Make it again.")
            # One matrix is written as a vector: ggml leaves out dimensions of one.
            sums = np.atleast_2d(checkpoint.read(name))
            counts = checkpoint.read(weight + _COUNTS).reshape(-1)
            if counts.size != sums.shape[0]:
                raise FileFormatError(
                    f"{path}: '{weight}' has {sums.shape[0]} rows and {counts.size} counts",
                    "Make it again.",
                )
            # An expert that never was asked says nothing: all its columns count alike.
            seen = counts[:, None] > 0
            means = np.where(seen, sums / np.maximum(counts[:, None], 1), 1.0)
            found[weight] = np.ascontiguousarray(means, np.float32)
        return {name: v[0] if v.shape[0] == 1 else v for name, v in found.items()}
    finally:
        checkpoint.close()


def _of_list(path: Path) -> dict[str, Array]:
    raw = path.read_bytes()
    found: dict[str, Array] = {}
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(raw):
            raise FileFormatError(
                f"{path}: is no importance matrix, or is cut off at byte {at}", "Make it again."
            )
        at += count
        return raw[at - count : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = number()
    if not 0 < entries <= len(raw) // 12:
        raise FileFormatError(f"{path}: is no importance matrix", "Give what llama-imatrix wrote.")
    for _ in range(entries):
        length = number()
        if not 0 < length <= _LONGEST_NAME:
            raise FileFormatError(f"{path}: has a name of {length} bytes", "Make it again.")
        name = take(length).decode("utf-8", "replace")
        calls, count = number(), number()
        if count <= 0:
            raise FileFormatError(f"{path}: '{name}' has {count} columns", "Make it again.")
        sums = np.frombuffer(take(4 * count), np.float32)
        found[name] = sums / np.float32(calls) if calls > 0 else np.array(sums)
    return found
