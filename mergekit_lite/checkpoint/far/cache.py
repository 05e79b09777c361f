"""Blocks of far files on this disk, for the next run; shared by all processes of a user.

A block ends in a digest of what it is and holds, so that one that was damaged or exchanged on the
disk is fetched again and never used. How many bytes there are together is noted in the folder and
changed under a lock, so that processes that write at a time keep to one limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["BlockCache"]

_DIGEST = 32
"""Bytes at the end of a block's file."""
_SLACK = 16
"""When blocks go, this part of the limit goes, so that the folder is not looked through often."""


class BlockCache:
    """The least lately used blocks go when there are too many.

    A cache that cannot be written is no error; a file that another process removed is none either.

    Args:
        folder: Of the blocks, a folder for each state of a file.
        limit: Bytes of all files of blocks together, which hold before and after each is written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.limit = limit
        self._folder = folder
        self._count = folder / ".bytes"
        with contextlib.suppress(OSError), self._alone():
            self._note(self._make_room(limit, limit))

    def find(self, identity: str, start: int, stop: int) -> bytes | None:
        """A block, if it is there and as it was written.

        Args:
            identity: Of the file's state.
            start: First byte of the block in its file.
            stop: One past its last.
        """
        path = self._path(identity, start, stop)
        try:
            with path.open("rb") as file:
                data, digest = file.read(stop - start), file.read(_DIGEST + 1)
        except OSError:
            return None
        good = digest == _digest(identity, start, stop, data)
        with contextlib.suppress(OSError):  # the folder may be one that can only be read
            if good:
                os.utime(path)
            else:
                path.unlink()
        return data if good else None

    def keep(self, identity: str, start: int, stop: int, data: bytes) -> None:
        """Take a block in, and let others go for it; arguments as for `find`."""
        size = len(data) + _DIGEST
        if size > self.limit or len(data) != stop - start:
            return
        path = self._path(identity, start, stop)
        digest = _digest(identity, start, stop, data)
        beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        with contextlib.suppress(OSError), self._alone():
            if path.is_file():  # another process fetched it too
                return
            held = self._noted()
            if held is None or held + size > self.limit:
                held = self._make_room(self.limit - size, self.limit - self.limit // _SLACK - size)
            self._note(held + size)  # first, since a file that is not counted would stay so
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with beside.open("wb") as file:
                    file.write(data)
                    file.write(digest)
                beside.rename(path)
            finally:
                beside.unlink(missing_ok=True)

    def _path(self, identity: str, start: int, stop: int) -> Path:
        state = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return self._folder / state / f"{start}-{stop}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other thread or process changes the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _noted(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            held = int(self._count.read_text("ascii"))
            return held if held >= 0 else None
        return None

    def _note(self, held: int) -> None:
        self._count.write_text(str(held), "ascii")

    def _make_room(self, most: int, down_to: int) -> int:
        """Look through the folder; where it holds too much, let go of the oldest.

        Args:
            most: Bytes that it may hold.
            down_to: Bytes that it holds afterwards where it held more.

        Returns:
            Bytes that it holds.
        """
        found = []
        for path in self._folder.glob("*/*"):  # also what a process that was killed left
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        held = sum(size for _, size, _ in found)
        if held <= most:
            return held
        for _, size, path in sorted(found):
            if held <= max(down_to, 0):
                break
            path.unlink(missing_ok=True)
            held -= size
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        return held


def _digest(identity: str, start: int, stop: int, data: bytes) -> bytes:
    digest = hashlib.blake2b(f"{identity}\n{start}-{stop}\n".encode(), digest_size=_DIGEST)
    digest.update(data)
    return digest.digest()
