"""Weighted average of the weights themselves ("model soup")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergekit_lite.errors import PackError
from mergekit_lite.kernels.fuse import weighted_sum
from mergekit_lite.methods.base import Chunk, Each, merge_method

__all__ = ["check_divisor", "linear"]


def check_divisor(parameters: Mapping[str, Any]) -> None:
    """Check that weights which are divided by their sum have one.

    Raises:
        PackError: They add up to zero.
    """
    weights = parameters["weight"]
    if parameters["normalize"] and abs(sum(weights)) < 1e-8:
        raise PackError(
            f"the weights {', '.join(f'{w:g}' for w in weights)} add up to zero",
            "Set 'normalize: false', or other weights.",
        )


@merge_method(
    "linear",
    formula="Σ wᵢ·θᵢ / Σ wᵢ",
    paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
    check=check_divisor,
)
def linear(chunk: Chunk, *, weight: Each[float] = 1.0, normalize: bool = True) -> None:
    """Weighted average of the models.

    Args:
        chunk: What to combine.
        weight: Share of each model.
        normalize: Whether to divide by the sum of the weights.
    """
    weights = np.asarray(weight, np.float64)
    divisor = float(weights.sum()) if normalize else 1.0
    weighted_sum(chunk.models, weights, divisor, chunk.out, chunk.scratch.floats)
