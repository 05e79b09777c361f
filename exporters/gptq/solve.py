"""GPTQ for one matrix, given the Gram matrix of its inputs.

Columns are rounded one after the other; what a column loses is made up for by those that follow
(Frantar et al., arXiv 2210.17323). With ``H = (U + 1) D (U + 1)ᵀ``, U strictly upper, the weight
that is rounded in column k is ``w_k + Σ_{j<k} (w_j − ŵ_j) U_jk``: QuIP's LDLQ (Chee et al., arXiv
2307.13304), which is equal to GPTQ and needs one Cholesky factor and no inverse. Blocks of columns
are rounded by a kernel; what a block loses reaches all later columns in one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.linears.quantized import STEPS, Grid, Quantized, in_slices, rounded
from exporters.schemes import Order
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels import grid

__all__ = ["Settings", "solve"]

_BLOCK = 128
_HARDER = 10


@dataclass(frozen=True)
class Settings:
    """How GPTQ rounds.

    Attributes:
        order: In which order columns are rounded, those with most activation first: ``groups``
            orders the groups, and the columns in each; ``static`` orders all columns, with scales
            found beforehand; ``columns`` orders all columns, and groups are those that follow one
            another then (act order, ``desc_act``); ``none`` takes them as they stand.
        damping: Added to the diagonal of the Gram matrix, as a share of its mean.
    """

    order: Order = "static"
    damping: float = 0.01


def solve(
    take_weights: Callable[[], Any],
    take_gram: Callable[[], Any],
    kind: Grid,
    settings: Settings,
    threads: int,
    label: str,
) -> Quantized:
    """Round a matrix.

    Args:
        take_weights: Gives torch's ``(in, out)`` float32, contiguous.
        take_gram: Gives torch's ``(in, in)`` float32, Σ x xᵀ over tokens, on the same device. Both
            keep none of it: there may be no room for a second one.
        kind: Of the grid.
        settings: How.
        threads: Worker threads.
        label: Of the matrix, for messages.

    Raises:
        PackError: The Gram matrix has NaN or infinity.
    """
    import torch

    gram = take_gram()
    columns = len(gram)
    size = kind.scheme.size(columns)
    diagonal = gram.diagonal().clone()
    mean = float(diagonal.mean())
    if not np.isfinite(mean):
        raise PackError(
            f"{label}: its inputs hold NaN or infinity", "Try --dtype float32, or other text."
        )
    order, group_of = _ordered(diagonal, size, settings.order)
    backwards = order.flip(0)
    gram = gram.index_select(0, backwards)
    gram = gram.index_select(1, backwards)
    lower = _factor(gram, settings.damping * mean or 1.0, label)
    del gram
    laid = take_weights().cpu()
    first = None
    if settings.order == "static" or size > _BLOCK:
        first = rounded(laid.numpy(), diagonal.cpu().numpy(), kind, threads)
    original = laid.index_select(0, order.cpu()).numpy()
    del laid
    # What a column's error costs once later columns have made up for what they can.
    importance = lower.diagonal().flip(0).square()
    state = _State(original, lower, importance.cpu().numpy(), group_of, kind, threads)
    if first is not None:
        state.scales[:] = first.scales
        state.lows[:] = -first.zeros.astype(np.float32)
        state.searched = False
    state.run(torch)
    back = np.empty_like(state.codes)
    places = order.cpu().numpy()
    back[places] = state.codes
    groups = np.empty_like(group_of)
    groups[places] = group_of
    return Quantized(back, state.scales, (-state.lows).astype(np.uint8), groups)


def _ordered(diagonal: Any, size: int, order: Order) -> tuple[Any, Array]:
    """The columns in the order in which they are rounded, and their groups."""
    import torch

    columns = len(diagonal)
    plain = torch.arange(columns, device=diagonal.device)
    if order == "none":
        return plain, (np.arange(columns) // size).astype(np.int32)
    if order == "groups":
        by_group = diagonal.reshape(-1, size)
        # The group whose inputs are strongest first; in it, the strongest column.
        groups = torch.argsort(by_group.amax(1), descending=True, stable=True)
        inside = torch.argsort(by_group, dim=1, descending=True, stable=True)[groups]
        found = (inside + groups[:, None] * size).flatten()
        return found, (found // size).cpu().numpy().astype(np.int32)
    found = torch.argsort(diagonal, descending=True, stable=True)
    if order == "static":
        return found, (found // size).cpu().numpy().astype(np.int32)
    return found, (np.arange(columns) // size).astype(np.int32)


def _factor(gram: Any, damping: float, label: str) -> Any:
    """The lower factor of a damped Gram matrix whose columns are in reverse.

    Read backwards it is the upper factor R of ``H = R Rᵀ``.
    """
    import torch

    diagonal = gram.diagonal()
    # Inputs that never came: their weights are rounded by themselves.
    diagonal[diagonal == 0] = damping / 0.01
    diagonal += damping
    for _ in range(4):
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not int(failed):
            return lower
        diagonal += damping * _HARDER
        damping *= _HARDER
    raise PackError(
        f"{label}: the Gram matrix of its inputs cannot be factored",
        "Give more or other calibration text, or a larger --damping.",
    )


class _State:
    """The columns of a matrix while they are rounded; arrays are laid out with columns first."""

    def __init__(
        self,
        original: Array,
        lower: Any,
        importance: Array,
        group_of: Array,
        kind: Grid,
        threads: int,
    ) -> None:
        columns, rows = original.shape
        groups = columns // kind.scheme.size(columns)
        self.original = original
        self.scales = np.empty((groups, rows), np.float32)
        self.lows = np.empty((groups, rows), np.float32)
        self.codes = np.empty((columns, rows), np.uint8)
        self.searched = True
        self._lower = lower
        self._importance = importance
        self._group_of = group_of
        self._kind = kind
        self._threads = threads

    def run(self, torch: Any) -> None:
        """Round all columns, block by block."""
        columns = len(self.original)
        device = self._lower.device
        w = torch.from_numpy(self.original.copy()).to(device)
        for first in range(0, columns, _BLOCK):
            stop = min(first + _BLOCK, columns)
            rows = self._rows(first, stop)
            inside = rows[:, : stop - first].contiguous().cpu().numpy()
            errors = self._block(w[first:stop].cpu().numpy(), inside, first, stop)
            if stop < columns:
                lost = torch.from_numpy(errors).to(device)
                w[stop:].addmm_(rows[:, stop - first :].T, lost)

    def _rows(self, first: int, stop: int) -> Any:
        """Rows of U + 1 from the diagonal of the first on: ``R / diag(R)``."""
        columns = len(self._lower)
        part = self._lower[columns - stop : columns - first, : columns - first]
        return part.flip(0, 1) / self._lower.diagonal()[: columns - first].flip(0)

    def _block(self, w: Array, inside: Array, first: int, stop: int) -> Array:
        """Round the columns of a block; returns what each lost, ``(columns, rows)``."""
        scheme = self._kind.scheme
        errors = np.empty_like(w)

        def work(begin: int, end: int) -> None:
            grid.settle(
                w, self.original[first:stop], inside, self._group_of[first:stop], self.searched,
                self._importance[first:stop], scheme.top, scheme.symmetric, self._kind.least_zero,
                STEPS, self._kind.digits, self.scales, self.lows, self.codes[first:stop], errors,
                begin, end,
            )  # fmt: skip

        in_slices(work, w.shape[1], (stop - first) * 16, self._threads)
        return errors
