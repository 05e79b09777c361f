"""What works that are made of one whole model have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mergekit_lite.checkpoint.protocol import InputFile
from mergekit_lite.engines.protocol import Work
from mergekit_lite.merge.checkpoint import MergeCheckpoint
from mergekit_lite.merge.model import WholeModel
from mergekit_lite.merge.stream import Job
from mergekit_lite.methods.base import Statistic

if TYPE_CHECKING:
    from mergekit_lite.merge.run import Progress

__all__ = ["ModelWork"]


class ModelWork(Work):
    """A work whose input is one model, which may be a merge that has not run.

    Attributes:
        model: It, open.
    """

    def __init__(self, model: WholeModel) -> None:
        self.model = model
        self._sources = {source.reference: source for source in model.sources}
        self.references = list(self._sources)
        self.paths = [source.path for source in model.sources]

    @property
    def _merged(self) -> MergeCheckpoint | None:
        checkpoint = self.model.checkpoint
        return checkpoint if isinstance(checkpoint, MergeCheckpoint) else None

    @property
    def statistic(self) -> Statistic | None:
        """A statistic that spans the model; None where none is needed."""
        return None if self._merged is None else self._merged.spanning

    @statistic.setter
    def statistic(self, settled: Statistic) -> None:
        if self._merged is not None:
            self._merged.spanning = settled

    def observe(self, run: Callable[[Iterator[Job]], None], progress: Progress) -> None:
        """Show that statistic all tensors."""
        self.model.observe(run, progress)

    def held_bytes(self, memory: int, threads: int) -> int:
        """What of a budget may be held between the passes of all tensors: all of it."""
        return memory

    def input_files(self, reference: str) -> list[InputFile]:
        """The weight files of an input, hashed."""
        return self._sources[reference].checkpoint.input_files()

    def close(self) -> None:
        """Close the model."""
        self.model.close()
