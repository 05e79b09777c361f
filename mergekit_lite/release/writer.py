"""Gathers the files of a release beside its final folder, which appears when it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from mergekit_lite.merge.writer import explained, partial_of, replace_folder, write_durably
from mergekit_lite.release.manifest import MANIFEST, Entry

__all__ = ["ReleaseWriter"]


class ReleaseWriter:
    """Gathers a release beside its final folder."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.entries: list[Entry] = []
        self._partial = partial_of(final)
        with explained(final):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def link(self, source: Path, entry: Entry) -> None:
        """Put in a file whose digest is known, without reading it."""
        target = self._partial / entry.path
        with explained(self.final):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), target)
            except OSError:
                shutil.copyfile(source, target)
        self.entries.append(entry)

    def write(self, path: str, content: bytes) -> None:
        """Put in a small file."""
        with explained(self.final):
            write_durably(self._partial / path, content)
        self.entries.append(Entry(path, len(content), hashlib.sha256(content).hexdigest()))

    def publish(self, manifest: bytes) -> None:
        """Give the release its name."""
        with explained(self.final):
            write_durably(self._partial / MANIFEST, manifest)
            replace_folder(self._partial, self.final)

    def drop(self) -> None:
        """Remove what did not become a release."""
        shutil.rmtree(self._partial, ignore_errors=True)
