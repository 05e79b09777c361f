"""One model as it is, for stacking layers of several models."""

from __future__ import annotations

from mergekit_lite.kernels.fuse import scaled
from mergekit_lite.methods.base import Chunk, Each, merge_method

__all__ = ["passthrough"]


@merge_method("passthrough", formula="scale·θ", paper="-", models=(1, 1))
def passthrough(chunk: Chunk, *, scale: Each[float] = 1.0) -> None:
    """Tensors of one model, copied; scaled where asked.

    Args:
        chunk: What to copy.
        scale: What to multiply every element by.
    """
    factor = float(scale[0])  # type: ignore[index]
    scaled(chunk.models[0], factor, chunk.out, chunk.scratch.floats)
