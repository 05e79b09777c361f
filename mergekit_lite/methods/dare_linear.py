"""DARE: drop elements of the deltas at random and rescale the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.methods.base import Between, Chunk, Each, Statistic, TensorContext, merge_method
from mergekit_lite.methods.linear import check_divisor
from mergekit_lite.methods.sparsify import Sparsity, cutoffs_of
from mergekit_lite.methods.task_arithmetic import add_deltas

__all__ = ["PAPER", "dare_linear", "dropping", "factors_of"]

PAPER = "Yu et al. 2024, Language models are super Mario (DARE), arXiv:2311.03099"


def dropping(
    tensor: TensorContext, *, density: Array, rescale: bool | str, **_: Any
) -> Statistic | None:
    """The L1 norms of what a drop keeps, where the rescaling wants them."""
    if rescale != "l1":
        return None
    return Sparsity(tensor, None, cutoffs_of(np.asarray(density)), norms=True)


def factors_of(density: Array, rescale: bool | str, statistic: Statistic | None) -> Array | None:
    """What the kept elements are multiplied by: 1/density as in the paper, or the L1 ratio."""
    if isinstance(statistic, Sparsity):
        return statistic.factors
    if not rescale:
        return None
    share = np.asarray(density, np.float64)
    return np.divide(1.0, share, out=np.ones_like(share), where=share > 0)


@merge_method(
    "dare_linear",
    formula="θ_base + λ·Σ wᵢ·mᵢ·(θᵢ - θ_base)/pᵢ, mᵢ ~ Bernoulli(pᵢ)",
    paper=PAPER,
    base=True,
    statistic=dropping,
    check=check_divisor,
)
def dare_linear(
    chunk: Chunk,
    *,
    weight: Each[float] = 1.0,
    density: Each[Annotated[float, Between(0.0, 1.0)]] = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool | Literal["l1"] = True,
    statistic: Statistic | None,
) -> None:
    """Task vectors thinned at random and rescaled, then summed.

    Args:
        chunk: What to combine.
        weight: What each delta is multiplied by.
        density: Probability that an element of a delta is kept.
        lambda_: What the sum is multiplied by.
        normalize: Whether to divide by the sum of the weights.
        rescale: true divides by the density (the paper), l1 matches the L1 norm (mergekit).
        statistic: The L1 norms, where they are wanted.
    """
    add_deltas(
        chunk,
        np.asarray(weight),
        lambda_,
        normalize,
        factors=factors_of(density, rescale, statistic),  # type: ignore[arg-type]
        cutoffs=cutoffs_of(np.asarray(density)),
    )
