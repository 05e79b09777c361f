"""The scales of SmoothQuant: inputs with large channels are made even, so that 8 bits hold them.

Xiao et al., arXiv 2211.10438: columns are multiplied by ``max|x|^α / max|w|^(1−α)``, which the norm
before is divided by.
"""

from __future__ import annotations

from typing import Any

from exporters.linears.fold import Fold
from exporters.linears.folding import Seen

__all__ = ["SmoothScaling"]


class SmoothScaling:
    """See the module.

    Args:
        strength: α; 0 leaves the inputs as they are, 1 makes them all alike.
    """

    name = "smoothquant"
    norms_only = True

    def __init__(self, strength: float = 0.5) -> None:
        self._strength = strength

    def scales(self, fold: Fold, seen: Seen) -> Any:
        """One for each input."""
        import torch

        inputs = seen.largest.clamp(min=1e-5).pow(self._strength)
        every = torch.stack([weights.abs().amax(0) for weights in seen.weights])
        weights = every.amax(0).clamp(min=1e-5).pow(1 - self._strength)
        return (inputs / weights).clamp(1e-4, 1e4)
