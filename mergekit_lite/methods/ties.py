"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.methods.base import Between, Chunk, Each, TensorContext, Value, merge_method
from mergekit_lite.methods.sparsify import Sparsity, everything
from mergekit_lite.methods.task_arithmetic import add_deltas

__all__ = ["ties"]


def _trimming(tensor: TensorContext, *, density: Array, rescale: bool | str, **_: Any) -> Sparsity:
    return Sparsity(tensor, density, everything(tensor.models), norms=bool(rescale))


def _is_global(parameters: Mapping[str, Value]) -> bool:
    return parameters["trim"] == "global"


@merge_method(
    "ties",
    formula="θ_base + λ·Σ wᵢ·dᵢ / Σ wᵢ over trimmed deltas dᵢ that have the elected sign",
    paper="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    base=True,
    statistic=_trimming,
    spans_model=_is_global,
)
def ties(
    chunk: Chunk,
    *,
    weight: Each[float] = 1.0,
    density: Each[Annotated[float, Between(0.0, 1.0)]] = 1.0,
    lambda_: float = 1.0,
    normalize: bool = True,
    rescale: bool | Literal["l1"] = False,
    trim: Literal["tensor", "global"] = "tensor",
    statistic: Sparsity,
) -> None:
    """Task vectors trimmed to their largest elements, merged where their signs agree.

    Args:
        chunk: What to combine.
        weight: What each delta is multiplied by, also in the election.
        density: Share of each delta's elements that is kept, by magnitude.
        lambda_: What the merged delta is multiplied by.
        normalize: Whether to divide by the sum of the weights that agree.
        rescale: Whether to match the L1 norm of what is kept to that of the whole (true or l1).
        trim: Whether the share is kept of each tensor, or of the whole model as in the paper.
        statistic: Thresholds and rescaling factors.
    """
    add_deltas(
        chunk,
        np.asarray(weight),
        lambda_,
        normalize,
        elect=True,
        thresholds=statistic.thresholds,
        factors=statistic.factors,
    )
