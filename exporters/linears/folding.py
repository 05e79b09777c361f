"""Channels that are scaled before rounding: what AWQ and SmoothQuant have in common.

Scales of the columns of a group of matrices go into whatever gives its inputs; which scales, a
method decides. The scaled weights are then rounded as GPTQ rounds them, or to the nearest code with
the best range of each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from exporters.linears.fold import (
    Fold,
    Norm,
    apply_fold,
    columns_of,
    differs,
    expanded,
    find_folds,
)
from exporters.linears.gram import Inputs, Stage, gather, stages_of
from exporters.linears.matrices import Matrix, by_place
from exporters.linears.quantized import Grid, rounded
from exporters.linears.rounder import FEWEST_TOKENS, LayerResult, Rounder, Stored, check_finite
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import LayerRun
from mergekit_lite.evaluate.inputs import Place

__all__ = ["FoldingRounder", "Scaling", "Seen"]

_SAME = 1e-2


@dataclass(frozen=True)
class Seen:
    """What is known of a group of matrices when its scales are chosen.

    Attributes:
        gram: ``(in, in)`` float32, mean of x xᵀ over tokens.
        sizes: ``(in,)`` float32, mean of |x|.
        largest: ``(in,)`` float32, the largest |x|.
        weights: ``(rows, in)`` float32 of each matrix.
    """

    gram: Any
    sizes: Any
    largest: Any
    weights: Sequence[Any]


class Scaling(Protocol):
    """Chooses scales."""

    name: str
    norms_only: bool

    def scales(self, fold: Fold, seen: Seen) -> Any:
        """``(channels,)`` float32 that columns are multiplied by; None for none."""


class FoldingRounder:
    """Scales channels, then rounds.

    Args:
        scaling: Chooses the scales.
        grid: Of the codes.
        threads: Worker threads.
        device: torch's.
        compensating: Rounds the scaled weights; None for the nearest code.
    """

    def __init__(
        self,
        scaling: Scaling,
        grid: Grid,
        threads: int,
        device: str,
        compensating: Rounder | None,
    ) -> None:
        self._scaling = scaling
        self._compensating = compensating
        self._grid = grid
        self._threads = threads
        self._device = device
        self._known: dict[tuple[Place, ...], tuple[list[Stage], list[Fold]]] = {}

    def details(self) -> Mapping[str, Any]:
        """See `Rounder`."""
        if self._compensating is None:
            return {"method": self._scaling.name, "rounding": "nearest"}
        return {"method": self._scaling.name, "rounding": dict(self._compensating.details())}

    def round(
        self,
        index: int,
        layer: Any,
        run: LayerRun,
        matrices: Sequence[Matrix],
        stored: Stored,
    ) -> LayerResult:
        """See `Rounder`."""
        result = LayerResult()
        for matrix in matrices:
            check_finite(matrix, matrix.of(layer).float().cpu().numpy())
        placed = by_place(matrices)
        stages, folds = self._shape(index, layer, run, matrices, tuple(placed), result)
        columns = {place: held[0].shape[1] for place, held in placed.items()}
        inputs = gather(layer, run, stages, [], columns, self._device)
        leaders = {place: leader for stage in stages for place, leader in stage.items()}
        before = run.sample()
        kept = {name: p.clone() for name, p in layer.named_parameters() if p.ndim == 1}
        importance: dict[Place, Any] = {
            place: inputs[leader].gram.diagonal().clone() for place, leader in leaders.items()
        }
        for fold in folds:
            self._scale(layer, fold, inputs, leaders, importance, stored)
        if folds and differs(run.sample(), before) > _SAME:
            raise PackError(
                f"layer {index}: scaling its channels changes what it computes",
                "Models of this kind can be quantized with --to gptq.",
            )
        _note_changed(layer, kept, folds, {m.parameter for m in matrices}, stored, result)
        if self._compensating is not None:
            del inputs
            more = self._compensating.round(index, layer, run, matrices, stored)
            result.quantized |= more.quantized
            result.notes += more.notes
            return result
        for place, held in placed.items():
            weight = importance[place].float().cpu().numpy()
            enough = inputs[leaders[place]].tokens >= FEWEST_TOKENS
            for matrix in held:
                self._round(layer, matrix, weight if enough and weight.max() > 0 else None, result)
        return result

    def _shape(
        self,
        index: int,
        layer: Any,
        run: LayerRun,
        matrices: Sequence[Matrix],
        places: tuple[Place, ...],
        result: LayerResult,
    ) -> tuple[list[Stage], list[Fold]]:
        """Stages and folds; those of layers of one kind are alike, and found once."""
        if places not in self._known:
            stages = stages_of(layer, run, places)
            folds = find_folds(layer, run, stages, self._scaling.norms_only)
            self._known[places] = stages, folds
            if not folds:
                raise PackError(
                    f"layer {index}: neither a norm nor a linear layer takes the scales of any of "
                    "its matrices",
                    "Models of this kind can be quantized with --to gptq.",
                )
            scaled = {place[0] for fold in folds for place in fold.consumers}
            left = list(dict.fromkeys(m.parameter for m in matrices if m.parameter not in scaled))
            if left and not self._scaling.norms_only:
                result.notes.append(
                    f"nothing before {', '.join(left)} takes scales; they are rounded as they are"
                )
        return self._known[places]

    def _scale(
        self,
        layer: Any,
        fold: Fold,
        inputs: Mapping[Place, Inputs],
        leaders: Mapping[Place, Place],
        importance: dict[Place, Any],
        stored: Stored,
    ) -> None:
        """Find the scales of a group, and apply them."""
        import torch

        known = [place for place in leaders if _reads(fold, place)]
        seen = {leaders[place] for place in known}
        tokens = sum(inputs[leader].tokens for leader in seen)
        if tokens < FEWEST_TOKENS:
            return
        gram = sum(inputs[leader].whole() for leader in seen) / tokens
        sizes = sum(inputs[leader].sizes for leader in seen) / tokens
        largest = torch.stack([inputs[leader].largest for leader in seen]).amax(0)
        weights = [columns_of(layer, place) for place in known]
        best = self._scaling.scales(fold, Seen(gram, sizes, largest, weights))
        if best is None:
            return
        rounding = None
        if isinstance(fold.producer, Norm):
            path = f"{fold.producer.path}.weight"
            rounding = lambda values: stored(path, values)  # noqa: E731
        was = columns_of(layer, known[0])[:1].clone()
        apply_fold(layer, fold, best, rounding)
        wide = expanded(fold.producer, best)
        now = columns_of(layer, known[0])[:1]
        # What the columns were really multiplied by, where rounding a norm changed it.
        wide = torch.where(was == 0, wide, now / was)[0]
        for place in known:
            importance[place] /= wide.square()

    def _round(self, layer: Any, matrix: Matrix, weight: Any, result: LayerResult) -> None:
        import torch

        laid = np.ascontiguousarray(matrix.of(layer).float().T.cpu().numpy())
        own = rounded(laid, weight, self._grid, self._threads)
        result.quantized[matrix.tensor] = own
        matrix.of(layer).copy_(torch.from_numpy(own.values()))


def _reads(fold: Fold, place: Place) -> bool:
    """Whether a place is among those whose inputs a fold scales."""
    return place in fold.consumers or (place[0], None) in fold.consumers


def _note_changed(
    layer: Any,
    kept: Mapping[str, Any],
    folds: Sequence[Fold],
    matrices: set[str],
    stored: Stored,
    result: LayerResult,
) -> None:
    """Gather parameters that changed and are not rounded: norms, biases, routers."""
    changed = [
        name for name, value in kept.items()
        if not bool((layer.get_parameter(name) == value).all())
    ]  # fmt: skip
    changed += [p for fold in folds for p, _ in fold.consumers if p not in matrices]
    for name in dict.fromkeys(changed):
        parameter = layer.get_parameter(name)
        rounded_value = stored(name, parameter)
        parameter.copy_(rounded_value)
        result.changed[name] = rounded_value.float().cpu().numpy()
