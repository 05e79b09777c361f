"""Weighted average of the weights themselves ("model soup")."""

from __future__ import annotations

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.fuse import weighted_sum
from mergekit_lite.methods.base import Chunk, Each, merge_method

__all__ = ["divisor_of", "linear"]


def divisor_of(weight: Array, normalize: bool) -> float:
    """The sum of the weights, or 1.

    Raises:
        PackError: The weights add up to zero and should be divided by.
    """
    total = float(np.sum(weight)) if normalize else 1.0
    if abs(total) < 1e-8:
        raise PackError(
            f"the weights {', '.join(f'{w:g}' for w in weight)} add up to zero",
            "Set 'normalize: false', or other weights.",
        )
    return total


@merge_method(
    "linear",
    formula="Σ wᵢ·θᵢ / Σ wᵢ",
    paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
)
def linear(chunk: Chunk, *, weight: Each[float] = 1.0, normalize: bool = True) -> None:
    """Weighted average of the models.

    Args:
        chunk: What to combine.
        weight: Share of each model.
        normalize: Whether to divide by the sum of the weights.
    """
    weights = np.asarray(weight, np.float64)
    divisor = divisor_of(weights, normalize)
    weighted_sum(chunk.models, weights, divisor, chunk.out, chunk.scratch.floats)
