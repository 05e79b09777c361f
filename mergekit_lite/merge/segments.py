"""One output file, written by many threads in any order, hashed in order, past the page cache.

Bytes are gathered in aligned segments. A full segment is hashed when its turn comes, by whichever
thread filled the gap, and handed to a thread that writes it. With ``O_DIRECT`` the disk takes it
from our memory: the system need not find, fill and later flush pages of its own for a file that
this program never reads, nor give up pages of the inputs for them. Where the file system does not
offer that, the same writes go through the page cache and are flushed as they go.

No thread may run further ahead of what is on the disk than a window of segments. Threads take the
earliest piece of work there is, so whoever has the piece that everyone waits for is never kept
waiting itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from pathlib import Path

import numpy as np

from mergekit_lite.dtypes import Array

__all__ = ["SegmentedFile"]

SEGMENT = 1 << 22
WINDOW = 8
_ALIGN = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


class _Segment:
    """A part of the file: its place, its bytes, and how many have arrived."""

    def __init__(self, index: int, data: Array) -> None:
        self.index = index
        self.data = data
        self.filled = 0


class SegmentedFile:
    """A file of a size that is known from the start.

    Args:
        path: Created, or emptied.
        size: In bytes.

    Raises:
        OSError: It cannot be created; from `write` and `finish`, a segment could not be written.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._last = max(0, -(-size // SEGMENT) - 1)
        self._sha256 = hashlib.sha256()
        self._open: dict[int, _Segment] = {}
        self._full: dict[int, _Segment] = {}
        self._idle: list[Array] = []
        self._hashing = False
        self._hashed = 0
        self._written = 0
        self._failure: OSError | None = None
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[_Segment | None] = queue.SimpleQueue()
        self._fd, self._direct = _create(path)
        self._writer = threading.Thread(target=self._write_all, name="pack-write", daemon=True)
        self._writer.start()

    def write(self, offset: int, data: Array) -> None:
        """Take bytes, a contiguous uint8 array, for an offset; from any thread, each byte once."""
        while data.size:
            index, at = divmod(offset, SEGMENT)
            count = min(data.size, SEGMENT - at)
            segment = self._segment(index)
            segment.data[at : at + count] = data[:count]
            with self._changed:
                segment.filled += count
                complete = segment.filled == self._length(index)
                if complete:
                    self._full[index] = self._open.pop(index)
            if complete:
                self._hash_in_turn()
            offset += count
            data = data[count:]

    def finish(self) -> str:
        """Wait until all is on the disk; returns the SHA-256 of the file."""
        with self._changed:  # another thread may still be hashing the last segments
            while self._failure is None and self._hashed <= self._last:
                self._changed.wait()
        self._queue.put(None)
        self._writer.join()
        if self._failure is not None:
            raise self._failure
        os.ftruncate(self._fd, self._size)
        os.fsync(self._fd)
        self.close()
        return self._sha256.hexdigest()

    def abort(self) -> None:
        """Let everyone who waits for this file give up."""
        with self._changed:
            self._failure = self._failure or OSError(errno.ECANCELED, "stopped")
            self._changed.notify_all()

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._writer.is_alive():
            self.abort()
            self._queue.put(None)
            self._writer.join()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _length(self, index: int) -> int:
        return min(SEGMENT, self._size - index * SEGMENT)

    def _segment(self, index: int) -> _Segment:
        """The segment of an index, begun if need be; waits while it is too far ahead."""
        with self._changed:
            while self._failure is None and index >= self._written + WINDOW:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            segment = self._open.get(index)
            if segment is None:
                data = self._idle.pop() if self._idle else _aligned()
                segment = self._open[index] = _Segment(index, data)
            return segment

    def _hash_in_turn(self) -> None:
        """Hash full segments as long as the next one is there; one thread at a time."""
        while True:
            with self._changed:
                if self._hashing or self._hashed not in self._full:
                    return
                segment = self._full.pop(self._hashed)
                self._hashing = True
            self._sha256.update(segment.data[: self._length(segment.index)].data)
            self._queue.put(segment)
            with self._changed:
                self._hashed += 1
                self._hashing = False
                self._changed.notify_all()

    def _write_all(self) -> None:
        """The writing thread: segments arrive in their order in the file."""
        while (segment := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    self._write_segment(segment)
            except OSError as error:
                with self._changed:
                    self._failure = error
            with self._changed:
                self._written += 1
                self._idle.append(segment.data)
                self._changed.notify_all()

    def _write_segment(self, segment: _Segment) -> None:
        offset = segment.index * SEGMENT
        length = self._length(segment.index)
        if self._direct:  # whole blocks only; what is too much is cut off at the end
            length += -length % _ALIGN
        done = 0
        while done < length:
            try:
                done += os.pwrite(self._fd, segment.data[done:length].data, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = False
                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_DIRECT)
        if not self._direct and segment.index % WINDOW == WINDOW - 1:
            getattr(os, "fdatasync", os.fsync)(self._fd)


def _create(path: Path) -> tuple[int, bool]:
    """Create a file; returns its descriptor and whether it bypasses the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(path, flags, 0o666), False


def _aligned() -> Array:
    """A buffer that begins at a page, as ``O_DIRECT`` wants it."""
    return np.frombuffer(mmap.mmap(-1, SEGMENT), np.uint8)
