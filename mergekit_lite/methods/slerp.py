"""Spherical interpolation between two models."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.fuse import blend
from mergekit_lite.kernels.reduce import in_order, moments
from mergekit_lite.methods.base import Between, Chunk, Statistic, TensorContext, merge_method

__all__ = ["Angles", "slerp"]

NEARLY_PARALLEL = 0.9995
"""The |cosine| above which the arc is a line, as in mergekit."""


class Angles(Statistic):
    """Dot product and squared norms of base and model, whole or per row of the matrix view.

    Attributes:
        sums: ``(groups, 3)`` float64: ``x·y``, ``x·x``, ``y·y``.
        group: Elements of a group.
    """

    passes = 1

    def __init__(self, tensor: TensorContext, row_wise: bool) -> None:
        self._row_wise = row_wise and tensor.columns > 1
        self._block = tensor.columns if self._row_wise else tensor.block
        self.sums = np.zeros((max(1, -(-tensor.elements // self._block)), 3), np.float64)
        self.group = self._block if self._row_wise else max(1, tensor.elements)

    def observe(self, index: int, chunk: Chunk) -> None:
        """Sum over the chunk's blocks."""
        at = chunk.first // self._block
        out = self.sums[at : at - (-chunk.origin.size // self._block)]
        moments(chunk.origin, chunk.models[0], self._block, out, chunk.scratch.floats)

    def settle(self, index: int) -> None:
        """Add the blocks, unless every row stands for itself."""
        if not self._row_wise:
            self.sums = in_order(self.sums)[None]

    def factors(self, t: float) -> tuple[Array, Array]:
        """What base and model are multiplied by, per group; float64.

        Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
        """
        dot, left, right = self.sums.T
        norms = np.sqrt(left) * np.sqrt(right)
        cosine = np.divide(dot, norms, out=np.ones_like(dot), where=norms > 0)
        straight = np.abs(cosine) > NEARLY_PARALLEL
        angle = np.arccos(np.where(straight, 0.0, cosine))
        sine = np.sin(angle)
        a = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
        b = np.where(straight, t, np.sin(t * angle) / sine)
        return a, b


def _angles(tensor: TensorContext, *, row_wise: bool, **_: Any) -> Angles:
    return Angles(tensor, row_wise)


@merge_method(
    "slerp",
    formula="sin((1-t)Ω)/sinΩ·θ_base + sin(tΩ)/sinΩ·θ, Ω the angle between them",
    paper="Shoemake 1985, doi:10.1145/325334.325242",
    base=True,
    symmetric=False,
    models=(1, 1),
    statistic=_angles,
)
def slerp(
    chunk: Chunk,
    *,
    t: Annotated[float, Between(0.0, 1.0)],
    row_wise: bool = False,
    statistic: Angles,
) -> None:
    """Interpolation along the arc from the base to one other model.

    Args:
        chunk: What to combine.
        t: Position on the arc: 0 is the base, 1 the other model.
        row_wise: Whether every row of a matrix has an angle of its own, or the tensor has one.
        statistic: The angles.
    """
    a, b = statistic.factors(t)
    if len(a) > 1:
        rows = slice(chunk.first // statistic.group, None)
        a, b = a[rows], b[rows]
    blend(
        chunk.origin, chunk.models[0], a, b, statistic.group, chunk.out,
        chunk.scratch.floats,
    )  # fmt: skip
