"""Sums over a base and its fine-tunes, and the measures of change that follow from them.

A measure is None where it is not defined (a cosine to what is zero), and NaN where a model holds
NaN or infinity: the first is nothing to worry about, the second is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import Self

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.differ import COLUMNS, SHARED

__all__ = ["Sums"]


@dataclass(frozen=True)
class Sums:
    """Sums over some elements of a base and ``n`` models.

    Attributes:
        elements: How many.
        each: ``(n, 6)`` float64, see `mergekit_lite.kernels.differ.COLUMNS`.
        pairs: ``(n, n)`` float64, products of the changes of two models, above the diagonal.
        common: ``(4,)`` float64, see `mergekit_lite.kernels.differ.SHARED`.
    """

    elements: int
    each: Array
    pairs: Array
    common: Array

    @classmethod
    def empty(cls, models: int) -> Self:
        """Sums over nothing."""
        return cls(0, np.zeros((models, COLUMNS)), np.zeros((models, models)), np.zeros(SHARED))

    @classmethod
    def over(cls, models: int, parts: Sequence[Sums]) -> Self:
        """The sums of several parts, added in their order."""
        whole = cls.empty(models)
        for part in parts:
            largest = np.maximum(whole.each[:, 3], part.each[:, 3])  # NaN wins
            whole.each[:] += part.each
            whole.each[:, 3] = largest
            whole.pairs[:] += part.pairs
            whole.common[:] += part.common
        return cls(sum(part.elements for part in parts), whole.each, whole.pairs, whole.common)

    def relative(self, model: int) -> float:
        """Norm of the change relative to that of the base; infinite where only the base is 0."""
        change, size = float(self.each[model, 0]), float(self.common[0])
        if size == 0:
            return 0.0 if change == 0 else inf if change > 0 else nan
        ratio = change / size
        return sqrt(ratio) if ratio >= 0 else nan

    def cosine(self, model: int) -> float | None:
        """Cosine between the model and the base; None where one of them is zero."""
        return _cosine(self.each[model, 1], self.common[0], self.each[model, 2])

    def largest(self, model: int) -> float:
        """Largest change of an element."""
        return float(self.each[model, 3])

    def changed(self, model: int) -> float:
        """Share of the elements that changed."""
        return float(self.each[model, 4] / self.elements) if self.elements else 0.0

    def agreement(self, first: int, second: int) -> float | None:
        """Cosine between the changes of two models; None where one of them changed nothing."""
        low, high = sorted((first, second))
        product = self.each[low, 0] if low == high else self.pairs[low, high]
        return _cosine(product, self.each[low, 0], self.each[high, 0])

    @property
    def conflict(self) -> float | None:
        """Of the elements that two or more models changed, the share in which signs differ."""
        return float(self.common[2] / self.common[1]) if self.common[1] else None

    def not_finite(self, model: int | None) -> int:
        """Elements of a model, or with None of the base, that are NaN or infinite."""
        return int(self.common[3] if model is None else self.each[model, 5])


def _cosine(product: float, first: float, second: float) -> float | None:
    if first == 0 or second == 0:
        return None
    lengths = sqrt(first) * sqrt(second) if first > 0 and second > 0 else nan
    cosine = float(product) / lengths
    return min(1.0, max(-1.0, cosine)) if cosine == cosine else nan
