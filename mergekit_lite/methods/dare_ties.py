"""DARE with the sign election of TIES."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np

from mergekit_lite.methods.base import Between, Chunk, Each, Statistic, merge_method
from mergekit_lite.methods.dare_linear import PAPER, dropping, factors_of
from mergekit_lite.methods.sparsify import cutoffs_of
from mergekit_lite.methods.task_arithmetic import add_deltas

__all__ = ["dare_ties"]


@merge_method(
    "dare_ties",
    formula="θ_base + λ·Σ wᵢ·dᵢ over thinned deltas dᵢ = mᵢ·(θᵢ - θ_base)/pᵢ with the elected sign",
    paper=PAPER + "; sign election: arXiv:2306.01708",
    base=True,
    statistic=dropping,
)
def dare_ties(
    chunk: Chunk,
    *,
    weight: Each[float] = 1.0,
    density: Each[Annotated[float, Between(0.0, 1.0)]] = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool | Literal["l1"] = True,
    statistic: Statistic | None,
) -> None:
    """Task vectors thinned at random and rescaled, merged where their signs agree.

    Args:
        chunk: What to combine.
        weight: What each delta is multiplied by, also in the election.
        density: Probability that an element of a delta is kept.
        lambda_: What the merged delta is multiplied by.
        normalize: Whether to divide by the sum of the weights that agree.
        rescale: true divides by the density (the paper), l1 matches the L1 norm (mergekit).
        statistic: The L1 norms, where they are wanted.
    """
    add_deltas(
        chunk,
        np.asarray(weight),
        lambda_,
        normalize,
        elect=True,
        factors=factors_of(density, rescale, statistic),  # type: ignore[arg-type]
        cutoffs=cutoffs_of(np.asarray(density)),
    )
