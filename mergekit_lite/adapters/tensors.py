"""The tensors of an adapter, decoded for arithmetic."""

from __future__ import annotations

import threading

import numpy as np

from mergekit_lite.checkpoint.protocol import Checkpoint, Rows, TensorSpec
from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.cast import decode

__all__ = ["AdapterTensors", "read_float"]

_HELD = 4


class AdapterTensors:
    """Decoded tensors of an adapter's file; the last few stay, since experts share theirs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.Lock()
        self._held: dict[str, Array] = {}

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self.checkpoint.spec(name)

    def matrix(self, name: str) -> Array:
        """A tensor as ``(first dimension, all others)``, float32, or float64 if stored so."""
        with self._lock:
            held = self._held.pop(name, None)
            if held is None:
                whole = read_float(self.checkpoint, name)
                held = whole.reshape(whole.shape[0], -1)
                while len(self._held) >= _HELD:
                    del self._held[next(iter(self._held))]
            self._held[name] = held
            return held

    def vector(self, name: str) -> Array:
        """A tensor as one row."""
        return self.matrix(name).reshape(-1)

    def rows(self, name: str, rows: Rows, out: Array) -> None:
        """Decode rows of the matrix view of a tensor into ``(rows, columns)``."""
        spec = self.checkpoint.spec(name)
        stored = self.checkpoint.read(name, rows)
        decode(stored.reshape(-1), spec.dtype, out.reshape(-1))


def read_float(checkpoint: Checkpoint, name: str) -> Array:
    """Read a whole tensor as float32, or as float64 if it is stored so; of the tensor's shape."""
    spec = checkpoint.spec(name)
    work = np.float64 if spec.dtype.name == "F64" else np.float32
    out = np.empty(spec.elements, work)
    decode(checkpoint.read(name).reshape(-1), spec.dtype, out)
    return out.reshape(spec.shape)
