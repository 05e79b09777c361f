"""Buffers that are used again: fresh memory costs a page fault for every 4096 bytes."""

from __future__ import annotations

import threading

import numpy as np

from mergekit_lite.dtypes import Array

__all__ = ["BufferPool", "padded"]

_STEP = 1 << 18
_IDLE_BYTES = 1 << 26


def padded(size: int) -> int:
    """A size in bytes, rounded up so that nearly equal ones can share buffers."""
    return -(-size // _STEP) * _STEP


class BufferPool:
    """Idle buffers by size, at most 64 MB of them; safe to share between threads."""

    def __init__(self) -> None:
        self._idle: dict[int, list[Array]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Array:
        """A uint8 buffer of at least so many bytes."""
        size = padded(size)
        with self._lock:
            idle = self._idle.get(size)
            if idle:
                self._bytes -= size
                return idle.pop()
        return np.empty(size, np.uint8)

    def give(self, array: Array) -> None:
        """Return a buffer, or a view of one, that is not used any more."""
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        with self._lock:
            if self._bytes + root.nbytes <= _IDLE_BYTES:
                self._bytes += root.nbytes
                self._idle.setdefault(root.nbytes, []).append(root)
