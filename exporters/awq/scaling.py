"""The scales of AWQ: channels that carry much are scaled up before rounding.

Lin et al., arXiv 2306.00978: ``s = x^r / w^(1−r)`` of the mean size x of a channel's inputs and w
of its weights, with r searched for; here for what rounding costs at the outputs, ``Σ Δw G Δwᵀ``
with the Gram matrix G of the inputs, on some of the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.linears.fold import Fold, Linear, expanded
from exporters.linears.folding import Seen
from exporters.linears.quantized import Grid, rounded

__all__ = ["AwqScaling"]

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_BETWEEN = 0.05
_ROWS = 256
_STEPS = 4


class AwqScaling:
    """See the module.

    Args:
        grid: Of the codes.
        threads: Worker threads.
    """

    name = "awq"
    norms_only = False

    def __init__(self, grid: Grid, threads: int) -> None:
        self._grid = grid
        self._threads = threads

    def scales(self, fold: Fold, seen: Seen) -> Any:
        """The scales that cost least; None where plain rounding does."""
        import torch

        sizes = seen.sizes
        step = max(1, sum(map(len, seen.weights)) // _ROWS)
        rows = torch.cat([weights[::step] for weights in seen.weights]).contiguous()
        size = self._grid.scheme.size(rows.shape[1])
        shares = rows.abs().reshape(len(rows), -1, size)
        means = (shares / shares.amax(2, keepdim=True).clamp(min=1e-12)).mean(0).flatten()
        producer = fold.producer
        if isinstance(producer, Linear) and producer.repeat > 1:
            heads = -1, producer.repeat, producer.head
            sizes, means = (v.reshape(heads).mean(1).flatten() for v in (sizes, means))
        tried: dict[float, float] = {}

        def scales_of(ratio: float) -> Any:
            found = sizes.clamp(min=1e-8).pow(ratio) / means.clamp(min=1e-8).pow(1 - ratio)
            return (found / (found.max() * found.min()).sqrt()).clamp(1e-4, 1e4)

        def cost(ratio: float) -> float:
            if ratio not in tried:
                wide = expanded(producer, scales_of(ratio))
                tried[ratio] = self._cost(rows, seen.gram, wide)
            return tried[ratio]

        best = min(_RATIOS, key=cost)
        best = min((best, best - _BETWEEN, best + _BETWEEN), key=cost)
        if cost(best) >= self._cost(rows, seen.gram, None):
            return None
        return scales_of(best).to(torch.float32)

    def _cost(self, rows: Any, gram: Any, scales: Any) -> float:
        """What rounding rows costs at their outputs, with columns scaled."""
        import torch

        weight = gram.diagonal()
        scaled = rows if scales is None else rows * scales
        weight = weight if scales is None else weight / scales.square()
        laid = np.ascontiguousarray(scaled.T.cpu().numpy())
        found = rounded(laid, weight.cpu().numpy(), self._grid, self._threads, _STEPS).values()
        values = torch.from_numpy(found).to(rows.device)
        if scales is not None:
            values = values / scales
        lost = values - rows
        return float((lost @ gram * lost).sum())
