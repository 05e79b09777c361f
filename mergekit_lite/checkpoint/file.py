"""One open file of weights: positioned reads, and the digest of its bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mergekit_lite.checkpoint.announce import is_announcing
from mergekit_lite.checkpoint.digest import FileDigest, as_bytes, read_into
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.checkpoint.protocol import InputFile
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import FileFormatError, PackError

__all__ = ["WeightFile"]


class WeightFile:
    """A file that is read in pieces, by any thread.

    Attributes:
        path: Where it lies.
        name: Relative to the model.
        size: In bytes.

    Raises:
        FileFormatError: It cannot be opened, or is no file of weights at all.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        if not path.is_file():
            raise FileFormatError(
                f"{path}: is not a regular file", "Give a folder of weights or a file of them."
            )
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FileFormatError(
                f"{path}: cannot be opened ({error.strerror})",
                "Check the path and its permissions.",
            ) from None
        try:
            self._stat = os.fstat(self._fd)
            self.size = self._stat.st_size
            if os.pread(self._fd, 8, 0) == b"version ":
                raise FileFormatError(
                    f"{path}: is a pointer of Git LFS, not the file itself",
                    "Fetch the file: git lfs pull",
                )
            self._known = KNOWN.find(self._stat)
            self._digest = FileDigest(self._fd, self.size, str(path))
            self._head_sha256 = ""
        except BaseException:
            os.close(self._fd)
            raise

    def peek(self, offset: int, count: int) -> bytes:
        """Bytes of the head, fewer where the file ends."""
        raw = bytearray(max(0, min(count, self.size - offset)))
        read_into(self._fd, offset, memoryview(raw), str(self.path))
        return bytes(raw)

    def note_head(self, head: bytes) -> None:
        """Take note of the bytes before the tensors, which tell this file from a changed one."""
        self._head_sha256 = hashlib.sha256(head).hexdigest()
        self._digest.feed(0, memoryview(head))

    def read(self, offset: int, out: Array) -> None:
        """Fill a contiguous array from a byte offset, and hash what passes if that is not known."""
        view = as_bytes(out)
        read_into(self._fd, offset, view, str(self.path))
        if self._known is None:
            self._digest.feed(offset, view)

    def will_need(self, offset: int, count: int) -> None:
        """Ask the system to fetch bytes ahead."""
        if hasattr(os, "posix_fadvise") and not is_announcing():
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """Name, size, time of change and head in one line."""
        return f"{self.name} {self.size} {self._stat.st_mtime_ns} {self._head_sha256}"

    def finish(self) -> InputFile:
        """Hash the rest of the file and check that nobody changed it meanwhile.

        Raises:
            PackError: Somebody did.
        """
        sha256 = self._known or self._digest.hexdigest()
        try:
            now = self.path.stat()
        except OSError:
            now = None
        if now is None or _state(now) != _state(self._stat):
            raise PackError(
                f"{self.path}: changed while it was being read",
                "Wait until whatever writes it is done, then run again.",
            )
        KNOWN.note(self._stat, sha256)
        return InputFile(self.name, self.size, sha256)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
