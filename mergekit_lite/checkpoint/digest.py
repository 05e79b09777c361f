"""SHA-256 of a file, computed from its bytes as they pass, in whatever order they pass.

Several threads read a file's tensors side by side, while SHA-256 wants its bytes from first to
last. A piece that arrives at the frontier is hashed from memory; a piece that arrives early is
noted, and whoever closes the gap reads it once more, from the page cache. What was never read is
read when the digest is asked for.
"""

from __future__ import annotations

import hashlib
import os
import threading

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.errors import FileFormatError

__all__ = ["FileDigest", "as_bytes", "read_into", "sha256_of"]

_PIECE = 1 << 20


def read_into(fd: int, offset: int, out: memoryview, source: str) -> None:
    """Fill a buffer from a file at a byte offset.

    Raises:
        FileFormatError: The file ends before the buffer is full.
    """
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], offset + done)
        if count == 0:
            raise FileFormatError(
                f"{source}: ends at byte {offset + done}, while it is being read",
                "Something changed the file during the run; restore it and run again.",
            )
        done += count


class FileDigest:
    """The SHA-256 of one open file whose bytes are read in pieces, by any thread."""

    def __init__(self, fd: int, size: int, source: str) -> None:
        self._fd = fd
        self._size = size
        self._source = source
        self._hash = hashlib.sha256()
        self._frontier = 0
        self._early: dict[int, int] = {}
        self._lock = threading.Condition()
        self._busy = False
        self._busy_until = 0

    def feed(self, offset: int, data: memoryview) -> None:
        """Take note of bytes that have just been read from ``offset``."""
        end = offset + len(data)
        with self._lock:
            # The piece before this one is being hashed just now: that is worth the wait.
            while self._busy and self._busy_until == offset:
                self._lock.wait()
            if end <= self._frontier or end == offset:
                return
            if self._busy or offset > self._frontier:
                self._early[offset] = max(end, self._early.get(offset, 0))
                return
            self._busy = True
            self._busy_until = end
            data = data[self._frontier - offset :]
        try:
            self._hash.update(data)
            self._advance(end)
        except BaseException:
            with self._lock:
                self._busy = False
                self._lock.notify_all()
            raise

    def _advance(self, end: int) -> None:
        """Move the frontier to ``end``, and on through pieces that came early."""
        while True:
            with self._lock:
                self._frontier = end
                start = min(self._early, default=None)
                if start is None or start > end:
                    self._busy = False
                    self._lock.notify_all()
                    return
                stop = self._early.pop(start)
                self._busy_until = max(stop, end)
            if stop > end:
                self._hash_from_file(end, stop)
                end = stop

    def _hash_from_file(self, start: int, stop: int) -> None:
        buffer = np.empty(min(_PIECE, stop - start), np.uint8)
        while start < stop:
            piece = buffer.data[: min(_PIECE, stop - start)]
            read_into(self._fd, start, piece, self._source)
            self._hash.update(piece)
            start += len(piece)

    def hexdigest(self) -> str:
        """Hash what has not passed yet, and return the digest of the whole file.

        To be called once, when no other thread feeds any more.
        """
        if self._frontier < self._size:
            self._hash_from_file(self._frontier, self._size)
            self._frontier = self._size
        return self._hash.hexdigest()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hash a whole file."""
    with open(path, "rb") as file:  # noqa: PTH123 - a path or a descriptor's path
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_bytes(array: Array) -> memoryview:
    """View a contiguous array as its bytes."""
    return array.reshape(-1).view(np.uint8).data
