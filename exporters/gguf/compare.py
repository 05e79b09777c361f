"""Models and GGUF files side by side: all under GGUF's names, rows in its order."""

from __future__ import annotations

from collections.abc import Sequence

from exporters.gguf.export import GgufModel
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.checkpoint.protocol import Checkpoint

__all__ = ["comparable"]


def comparable(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints whose tensors are named and arranged alike.

    Args:
        checkpoints: Models, GGUF files, or both.

    Returns:
        As they are; or, where one of them is a GGUF file, all of them as GGUF has them.

    Raises:
        PackError: A model beside a GGUF file is of a family that GGUF does not know.
    """
    if not any(isinstance(checkpoint, GgufCheckpoint) for checkpoint in checkpoints):
        return list(checkpoints)
    return [
        checkpoint
        if isinstance(checkpoint, GgufCheckpoint)
        else GgufModel.convert(checkpoint, None).tensors
        for checkpoint in checkpoints
    ]
