"""Finished layers of a run, kept beside the result until it is whole, so that a run continues.

Each is a safetensors file, written whole or not at all, with the tensors as the result will have
them. A run whose inputs, text or settings differ begins afresh.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mergekit_lite.checkpoint.header import write_header
from mergekit_lite.checkpoint.safetensors import SafetensorsCheckpoint
from mergekit_lite.dtypes import Array, DType
from mergekit_lite.errors import PackError
from mergekit_lite.merge.writer import explained, layers_of

__all__ = ["LayerStore"]

_FINGERPRINT, _NOTES = "fingerprint", "notes"


class LayerStore:
    """The finished layers of one result; several processes may put layers into it.

    Args:
        final: Folder that the result will have.
        fingerprint: Of all that decides its bytes.
        count: Number of layers.

    Attributes:
        discarded: Whether `begin` found layers of another run, and removed them.
    """

    def __init__(self, final: Path, fingerprint: str, count: int) -> None:
        self._final = final
        self._folder = layers_of(final)
        self._fingerprint = fingerprint
        self._count = count
        self._open: dict[int, SafetensorsCheckpoint] = {}
        self.discarded = False

    def begin(self) -> None:
        """Make the folder, and remove layers of another run; for who leads the run.

        Raises:
            PackError: It cannot be made.
        """
        if self._folder.exists() and not self._folder.is_dir():
            raise PackError(f"{self._folder}: is not a folder", "Move it away.")
        with explained(self._final):
            self._folder.mkdir(parents=True, exist_ok=True)
            stated = self._folder / _FINGERPRINT
            same = stated.is_file() and stated.read_text() == self._fingerprint
            self.discarded = stated.is_file() and not same
            if not same:
                shutil.rmtree(self._folder)
                self._folder.mkdir()
                stated.write_text(self._fingerprint)

    @property
    def done(self) -> list[int]:
        """Numbers of the layers that are finished, in order."""
        return [index for index in sorted(self.listed()) if self._opens(index)]

    def has(self, index: int) -> bool:
        """Whether a layer is there and whole; one that is not is made again, and replaced.

        It is not removed: what this machine cannot open just now, another may be reading.
        """
        return index in self._open or (index in self.listed() and self._opens(index))

    def _opens(self, index: int) -> bool:
        """Whether the file of a layer, which is there, is whole."""
        try:
            self.get(index)
        except PackError:
            return False
        return True

    def listed(self) -> set[int]:
        """Numbers of the layers that have a file, which is not looked into.

        The folder is listed, since a network's file system may remember for a while that a name was
        not there, but asks again whether a folder changed when that is opened.
        """
        try:
            names = {path.name for path in self._folder.iterdir()}
        except OSError:
            return set()
        return {index for index in range(self._count) if self._path(index).name in names}

    def _path(self, index: int) -> Path:
        return self._folder / f"layer-{index:05}.safetensors"

    def put(
        self,
        index: int,
        tensors: Mapping[str, tuple[DType, Array]],
        notes: Sequence[str],
        attempts: Path,
    ) -> None:
        """Keep a layer.

        Args:
            index: Its number.
            tensors: Type and content by name; content of the type's storage.
            notes: What the user should know of it.
            attempts: Folder of this run on the same disk, where it is written before it gets its
                name. It is gone when the run is over, so that what is late comes to nothing.
        """
        # Large types first, so that every tensor is aligned.
        order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
        prefix, _ = write_header(
            ((name, tensors[name][0], tensors[name][1].shape) for name in order),
            {_NOTES: json.dumps(list(notes))},
        )
        beside = attempts / uuid.uuid4().hex
        with explained(beside), beside.open("wb") as file:
            file.write(prefix)
            for name in order:
                file.write(np.ascontiguousarray(tensors[name][1]).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
            beside.rename(self._path(index))

    def get(self, index: int) -> SafetensorsCheckpoint:
        """A finished layer."""
        if index not in self._open:
            self._open[index] = SafetensorsCheckpoint(self._path(index))
        return self._open[index]

    def notes(self, index: int) -> list[str]:
        """What the user should know of a finished layer."""
        found: list[str] = json.loads(self.get(index).metadata().get(_NOTES, "[]"))
        return found

    def close(self) -> None:
        """Close all files."""
        for layer in self._open.values():
            layer.close()
        self._open.clear()
