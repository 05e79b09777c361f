"""IQ1, IQ2 and IQ3, whose groups name entries of codebooks: through ggml in the xllamacpp wheel.

Their codebooks and searches are large and their use is rare; the extra ``llama-cpp`` brings it
that has them. Reading them back is gguf-py's.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.blocks.ggml import shared_object

__all__ = ["NEED_IMPORTANCE", "decoder", "encoder"]

NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"})
"""Types that llama.cpp makes with an importance matrix only."""

_LOCK = threading.Lock()
_READY: set[int] = set()


def encoder(name: str, number: int) -> Any:
    """An `mergekit_lite.kernels.blocks.types.Encode` of one type."""

    def encode(values: Array, importance: Array | None, out: Array) -> None:
        if importance is None and name in NEED_IMPORTANCE:
            raise PackError(
                f"{name} needs an importance matrix",
                "Give one: --imatrix FILE; llama-imatrix of llama.cpp makes it.",
            )
        lib = _library(number)
        rows, columns = values.shape
        floats = np.ascontiguousarray(values, np.float32)
        stored = np.empty(out.shape, np.uint8)
        weights = None
        if importance is not None:
            weights = np.ascontiguousarray(importance, np.float32)
        lib.ggml_quantize_chunk(
            number, floats.ctypes.data, stored.ctypes.data, 0, rows, columns,
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        out[:] = stored

    return encode


def decoder(number: int) -> Any:
    """An `mergekit_lite.kernels.blocks.types.Decode` of one type."""

    def decode(stored: Array, out: Array) -> None:
        import gguf

        out[:] = gguf.dequantize(stored, gguf.GGMLQuantizationType(number))

    return decode


def _library(number: int) -> Any:
    with _LOCK:
        lib = ctypes.CDLL(str(shared_object()))
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip
        if number not in _READY:
            lib.ggml_quantize_init(number)
            _READY.add(number)
    return lib
