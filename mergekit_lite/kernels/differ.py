"""One pass over a base and some fine-tunes: sizes, cosines and signs of what they changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.jit import kernel

__all__ = ["COLUMNS", "compare"]

COLUMNS = 5
"""Numbers per model: Σd², Σx·b, Σx², largest |d|, and how many elements changed."""


@kernel
def compare(models: Any, base: Any, each: Any, pairs: Any, common: Any) -> None:
    """Compare some elements of models with those of their base; ``d = model - base``.

    Sums are taken in float64, first element to last, so that the same elements always give the
    same bits.

    Args:
        models: ``(n, m)`` float32.
        base: ``(m,)`` float32.
        each: ``(n, 5)`` float64, added to (the largest: raised); see `COLUMNS`.
        pairs: ``(n, n)`` float64, ``Σ dᵢ·dⱼ`` is added for ``i < j``.
        common: ``(3,)`` float64, added to: Σb², how many elements two or more models changed, and
            in how many of those they disagree in sign.
    """
    n = models.shape[0]
    deltas = np.empty(n, np.float64)
    for j in range(base.size):
        b = np.float64(base[j])
        common[0] += b * b
        above = 0
        below = 0
        for i in range(n):
            x = np.float64(models[i, j])
            d = x - b
            deltas[i] = d
            each[i, 0] += d * d
            each[i, 1] += x * b
            each[i, 2] += x * x
            if abs(d) > each[i, 3] or d != d:
                each[i, 3] = abs(d)
            if d != 0.0:
                each[i, 4] += 1.0
            if d > 0.0:
                above += 1
            elif d < 0.0:
                below += 1
        if above + below >= 2:
            common[1] += 1.0
            if above > 0 and below > 0:
                common[2] += 1.0
        for i in range(n):
            for k in range(i + 1, n):
                pairs[i, k] += deltas[i] * deltas[k]
