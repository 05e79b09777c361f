"""Digests of large files that were hashed before, so that the next merge of them need not.

A digest is kept under the file's device, inode, size and times of change, as git keeps its index.
The time of the last status change cannot be set by a program, so a file that was written to is
hashed again. A file that changed less than two seconds before its digest is noted is not
remembered: it could change once more without its times telling.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

from mergekit_lite.checkpoint.digest import sha256_of

__all__ = ["KNOWN", "KnownDigests", "known_sha256"]

_SETTLED_NS = 2 * 10**9


class KnownDigests:
    """One small file for each digest, in the user's cache folder.

    Attributes:
        enabled: Whether digests are looked up; they are noted in any case.
    """

    def __init__(self) -> None:
        self.enabled = True

    @staticmethod
    def _folder() -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pack" / "sha256"

    def _path(self, stat: os.stat_result) -> Path:
        identity = (
            f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        )
        return self._named(identity)

    def _named(self, identity: str) -> Path:
        return self._folder() / hashlib.sha256(identity.encode()).hexdigest()

    def find(self, stat: os.stat_result) -> str | None:
        """The digest of a file in this state, if it was hashed before."""
        return self._read(self._path(stat))

    def find_text(self, identity: str) -> str | None:
        """The digest of a file on a server in this state, if it was hashed before."""
        return self._read(self._named(f"far {identity}"))

    def note_text(self, identity: str, sha256: str) -> None:
        """Remember the digest of a file on a server."""
        self._write(self._named(f"far {identity}"), sha256)

    def note(self, stat: os.stat_result, sha256: str) -> None:
        """Remember a digest; a cache that cannot be written is no error."""
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _SETTLED_NS:
            return
        self._write(self._path(stat), sha256)

    def _read(self, path: Path) -> str | None:
        if not self.enabled:
            return None
        with contextlib.suppress(OSError, RuntimeError):
            text = path.read_text("ascii")
            if re.fullmatch(r"[0-9a-f]{64}", text):
                return text
        return None

    @staticmethod
    def _write(path: Path, sha256: str) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{os.getpid()}")
            beside.write_text(sha256, "ascii")
            beside.rename(path)


KNOWN = KnownDigests()
"""The digests of this user."""


def known_sha256(path: Path) -> str:
    """The digest of a file: as remembered of this state of it, else computed and remembered."""
    stat = path.stat()
    found = KNOWN.find(stat)
    if found is None:
        found = sha256_of(path)
        KNOWN.note(stat, found)
    return found
