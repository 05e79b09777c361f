"""Where the parameters of a model lie in the files of its checkpoint.

Most files name tensors as the model names its parameters. Those saved from the bare model lack a
prefix, and some are renamed or stacked while they are loaded; transformers knows how.
"""

from __future__ import annotations

from mergekit_lite.adapters.lora import Part
from mergekit_lite.checkpoint.protocol import Checkpoint

__all__ = ["ModelNames"]


class ModelNames:
    """Looks up parameters of one model."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._names = frozenset(base.names())

    def find(self, parameter: str) -> tuple[Part, ...]:
        """The places of a parameter; empty if the files have none."""
        if parameter in self._names:
            return (Part(parameter),)
        return ()

    def output_embedding(self) -> str | None:
        """Path of the module that gives the logits."""
        return None
