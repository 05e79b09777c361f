"""ggml's own quantizers, out of the xllamacpp wheel, as an oracle."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np


@cache
def _library() -> Any:
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    [file] = Path(spec.origin).parent.glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(file))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return lib


def quantize(number: int, values: Any, importance: Any = None) -> Any:
    """What ``ggml_quantize_chunk`` makes of float32 ``(rows, columns)``: uint8."""
    lib = _library()
    lib.ggml_quantize_init(number)
    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    out = np.empty((rows, columns // block * size), np.uint8)
    values = np.ascontiguousarray(values, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = lib.ggml_quantize_chunk(
        number, values.ctypes.data, out.ctypes.data, 0, rows, columns,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    assert written == out.size
    return out


def dequantize(number: int, stored: Any) -> Any:
    """What gguf-py takes the bytes for: float32."""
    found: Any = gguf.dequantize(stored, gguf.GGMLQuantizationType(number))
    return found
