"""Gathers the files of a release beside its final folder, which appears when it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_lite.merge.writer import explained, partial_of, replace_folder, write_durably
from mergekit_lite.release.manifest import MANIFEST, Entry

__all__ = ["ReleaseWriter", "link_or_copy", "new_folder"]


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file under another name, without copying it where the disk can do that."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well and vanishes otherwise."""
    partial = partial_of(final)
    with explained(final):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        with explained(final):
            replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
