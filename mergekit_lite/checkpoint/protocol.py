"""What every consumer of a model sees: a checkpoint, something one can ask for one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mergekit_lite.dtypes import Array, DType

__all__ = ["CHUNK_ELEMENTS", "Checkpoint", "InputFile", "Rows", "TensorReader", "TensorSpec"]

BLOCK_ELEMENTS = 4096
CHUNK_ELEMENTS = 1 << 19


class Rows(NamedTuple):
    """A range of rows of a tensor's matrix view, ``start`` included and ``stop`` excluded."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, and its *matrix view*, in whose rows it is read.

    The matrix view of a tensor of shape ``(a, b, c)`` is ``(a·b, c)``. A vector is read as a column
    (``n`` rows of one element) so that it can be cut into pieces, a scalar as one row.
    """

    shape: tuple[int, ...]
    dtype: DType

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data, in bytes."""
        return self.elements * self.dtype.itemsize

    @property
    def columns(self) -> int:
        """Elements in a row of the matrix view."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Rows of the matrix view."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else self.elements

    @property
    def block_rows(self) -> int:
        """Rows that are summed together, about 4096 elements; chunks begin at multiples of it."""
        return max(1, BLOCK_ELEMENTS // max(1, self.columns))

    def chunks(self, elements: int = CHUNK_ELEMENTS) -> Iterator[Rows]:
        """Cut the matrix view into ranges of rows of about so many elements."""
        if self.elements == 0:
            return
        block = self.block_rows
        step = max(block, elements // max(1, self.columns) // block * block)
        for start in range(0, self.rows, step):
            yield Rows(start, min(start + step, self.rows))


class TensorReader(ABC):
    """One tensor of a checkpoint, opened for reading by rows.

    A tensor that must be seen whole before any part of it is known (a merge that trims by rank, or
    needs norms) has *passes*: for each pass in turn, every chunk is observed, in any order and by
    any thread, and then the pass is settled by one thread. Files have none.
    """

    spec: TensorSpec
    passes: int = 0

    @property
    def origin(self) -> Hashable:
        """What readers that begin with the same stored rows have in common; None if unknown."""
        return None

    @property
    def far(self) -> bool:
        """Whether its bytes come over a network, so that none should be read twice."""
        return False

    @abstractmethod
    def read(self, rows: Rows, out: Array) -> None:
        """Write rows into ``out``, contiguous, of the spec's storage type and that many elements.

        Safe to call from several threads, after all passes are settled.
        """

    def observe(self, index: int, rows: Rows) -> None:
        """See one chunk in pass ``index``."""

    def settle(self, index: int) -> None:
        """Finish pass ``index``, when all of its chunks have been observed."""

    def resident_bytes(self) -> int:
        """Bytes that `keep` would hold between the passes."""
        return 0

    def keep(self) -> None:
        """Hold what the first pass reads until it is read for the last time."""

    def close(self) -> None:
        """Let go of everything that was kept."""


@dataclass(frozen=True)
class InputFile:
    """A file that a checkpoint was read from, for the lock.

    Attributes:
        path: Relative to the model.
        size: In bytes.
        sha256: Of the whole file.
    """

    path: str
    size: int
    sha256: str


class Checkpoint(ABC):
    """A model's tensors and the small files beside them.

    Attributes:
        label: How the user named it.
        folder: Where its config and tokenizer files lie; None for a bare file.
        config: The contents of its config.json; empty for a bare file.
    """

    label: str
    folder: Path | None
    config: Mapping[str, object]

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor.

        Raises:
            KeyError: There is no tensor of that name.
        """

    def kept_dtype(self, name: str) -> DType:
        """Type that a result keeps for a tensor if nobody asks for another.

        That of `spec`, but for tensors that are computed more finely than they are stored.
        """
        return self.spec(name).dtype

    def stored(self, name: str) -> tuple[str, int]:
        """Name of the type that a tensor is stored in, and its bytes there."""
        dtype = self.kept_dtype(name)
        return dtype.name, self.spec(name).elements * dtype.itemsize

    def file_of(self, name: str) -> str | None:
        """Name of the file that holds a tensor; None where it is computed."""
        return None

    def metadata(self) -> Mapping[str, str]:
        """What its files say of themselves beside their tensors."""
        return {}

    @abstractmethod
    def open(self, name: str) -> TensorReader:
        """Open a tensor for reading by rows."""

    def read(self, name: str, rows: Rows | None = None) -> Array:
        """Read a tensor, or some of its rows, at once.

        Returns:
            An array of the storage type: of the tensor's shape, or ``(rows, columns)``.
        """
        reader = self.open(name)
        spec = reader.spec
        wanted = rows or Rows(0, spec.rows)
        try:
            index = 0
            while index < reader.passes:  # a pass may show that another one is needed
                for chunk in spec.chunks():
                    reader.observe(index, chunk)
                reader.settle(index)
                index += 1
            out = np.empty(wanted.size * spec.columns, spec.dtype.storage)
            if out.size:
                reader.read(wanted, out)
        finally:
            reader.close()
        return out.reshape(spec.shape if rows is None else (wanted.size, spec.columns))

    def prefetch(self, name: str) -> None:
        """Ask for a tensor's bytes to be fetched in the background.

        Inside `announced`, say that it will be read in its turn.
        """

    def elsewhere(self) -> Mapping[str, tuple[int, int]]:
        """What is not on this disk, by host: bytes that were announced, and bytes of its files."""
        return {}

    def fingerprint(self) -> str:
        """Tell, from headers and file times alone, whether this is what was read before."""
        return ""

    def input_files(self) -> list[InputFile]:
        """The weight files that it was read from, hashed; to be called after the last read."""
        return []

    def close(self) -> None:
        """Close its files."""
