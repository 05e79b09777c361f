"""Gathers the files of a release beside its final folder, which appears when it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.errors import PackError
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.writer import (
    OutputFile,
    explained,
    replace_folder,
    sync_folder,
    write_durably,
)
from mergekit_lite.release.manifest import MANIFEST, Entry

__all__ = ["ReleaseWriter", "link_or_copy", "new_folder", "write_result"]


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file under another name, without copying it where the disk can do that.

    Raises:
        OSError: Something has that name already, or the disk is full.
    """
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:
        with source.open("rb") as content, target.open("xb") as file:
            shutil.copyfileobj(content, file, 1 << 20)


@contextmanager
def new_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well and vanishes otherwise.

    Args:
        final: Its name.
        replace: Whether what has that name by then gives way.

    Raises:
        PackError: Something else has the name by now, or the disk is full.
    """
    with explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f".{final.name}.*.partial"):  # of a run that was killed
            if not _lives(left.name.split(".")[-2]):
                shutil.rmtree(left, ignore_errors=True)
        partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
        partial.mkdir()
    try:
        yield partial
        with explained(final):
            if replace:
                replace_folder(partial, final)
            else:
                partial.rename(final)
                sync_folder(final.parent)
    except FileExistsError:
        raise PackError(f"{final}: is there already", "Somebody else made it just now.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def write_result(
    folder: Path,
    kind: str,
    fields: Mapping[str, Any],
    sources: Sequence[Source],
    files: Mapping[str, bytes],
) -> None:
    """Write a result of small files with its lock; what had the name gives way.

    Args:
        folder: Of the result.
        kind: Of the result, for its lock.
        fields: What else the lock says.
        sources: What went in, each once, all of it read.
        files: Contents by name.

    Raises:
        PackError: The disk is full.
    """
    weights = {source.reference: source.checkpoint.input_files() for source in sources}
    outputs = [
        OutputFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    ]
    lock = lock_file(kind, fields, sources, weights, outputs)
    with new_folder(folder, replace=True) as partial, explained(folder):
        for name, content in {**files, LOCK_NAME: lock}.items():
            write_durably(partial / name, content)


class ReleaseWriter:
    """Writes the files of a release.

    Args:
        folder: To write into.
        final: What the folder will be called, for errors.

    Attributes:
        entries: What was written.
    """

    def __init__(self, folder: Path, final: Path) -> None:
        self.entries: list[Entry] = []
        self._folder = folder
        self._final = final

    def link(self, source: Path, entry: Entry) -> None:
        """Put in a file whose digest is known, without reading it."""
        target = self._folder / entry.path
        with explained(self._final):
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source, target)
        self.entries.append(entry)

    def write(self, path: str, content: bytes) -> None:
        """Put in a small file."""
        with explained(self._final):
            write_durably(self._folder / path, content)
        self.entries.append(Entry(path, len(content), hashlib.sha256(content).hexdigest()))

    def seal(self, manifest: bytes) -> None:
        """Put in the manifest, the last file."""
        with explained(self._final):
            write_durably(self._folder / MANIFEST, manifest)
