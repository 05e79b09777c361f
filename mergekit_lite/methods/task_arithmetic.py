"""Weighted sum of task vectors on a base, and the sum that its sparse relatives share."""

from __future__ import annotations

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.fuse import delta_sum
from mergekit_lite.methods.base import Chunk, Each, merge_method
from mergekit_lite.methods.linear import check_divisor
from mergekit_lite.methods.sparsify import everything

__all__ = ["add_deltas", "task_arithmetic"]


def add_deltas(
    chunk: Chunk,
    weight: Array,
    scale: float,
    normalize: bool,
    *,
    elect: bool = False,
    thresholds: Array | None = None,
    factors: Array | None = None,
    cutoffs: Array | None = None,
) -> None:
    """Add the chunk's deltas to its base.

    Args:
        chunk: What to combine.
        weight: ``(n,)``.
        scale: What the sum is multiplied by (lambda).
        normalize: Whether to divide by the sum of the weights that take part.
        elect: Whether only deltas with the elected sign take part.
        thresholds: ``(n,)``; magnitudes below are dropped. None drops nothing.
        factors: ``(n,)``; what kept elements are multiplied by. None leaves them.
        cutoffs: ``(n,)`` uint64; see `sparsify.cutoffs_of`. None drops nothing.
    """
    tensor = chunk.tensor
    work, n = tensor.work, tensor.models
    delta_sum(
        chunk.models,
        chunk.origin,
        np.asarray(weight, np.float64),
        np.ones(n) if factors is None else np.asarray(factors, np.float64),
        np.zeros(n, work) if thresholds is None else thresholds,
        everything(n) if cutoffs is None else cutoffs,
        tensor.keys,
        chunk.first,
        elect,
        normalize,
        float(scale),
        chunk.out,
        chunk.scratch.floats,
        chunk.scratch.words,
    )


@merge_method(
    "task_arithmetic",
    formula="θ_base + λ·Σ wᵢ·(θᵢ - θ_base)",
    paper="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
    base=True,
    check=check_divisor,
)
def task_arithmetic(
    chunk: Chunk, *, weight: Each[float] = 1.0, lambda_: float = 1.0, normalize: bool = False
) -> None:
    """Sum of task vectors, added to the base.

    Args:
        chunk: What to combine.
        weight: What each task vector is multiplied by; negative to forget a task.
        lambda_: What their sum is multiplied by.
        normalize: Whether to divide by the sum of the weights.
    """
    add_deltas(chunk, np.asarray(weight), lambda_, normalize)
