"""GPTQ, layer by layer: each matrix with what goes into it once all before it are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gptq.solve import Settings, solve
from exporters.linears.gram import Inputs, Stage, gather, stages_of, stepwise
from exporters.linears.matrices import Matrix, by_place
from exporters.linears.quantized import Grid, Quantized, rounded
from exporters.linears.rounder import FEWEST_TOKENS, LayerResult, Stored, check_finite
from mergekit_lite.evaluate.forward import ACTIVATIONS, LayerRun
from mergekit_lite.evaluate.inputs import Place

__all__ = ["GptqRounder"]


class GptqRounder:
    """GPTQ.

    Args:
        grid: Of the codes.
        settings: How it rounds.
        threads: Worker threads.
        device: torch's.
        budget: Bytes of activations in the middle of a layer that may be held, so that each layer
            is run once; beyond, it is run once more for each of its matrices' inputs, to the same
            codes. None for half of what the machine has left.
    """

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        threads: int,
        device: str,
        budget: int | None = None,
    ) -> None:
        self._budget = budget
        self._stages: tuple[tuple[Place, ...], list[Stage]] = (), []
        self._grid = grid
        self._settings = settings
        self._threads = threads
        self._device = device

    def details(self) -> Mapping[str, Any]:
        """See `Rounder`."""
        order = self._settings.order
        return {
            "method": "gptq",
            "act_order": order,
            "damp_percent": self._settings.damping,
            "static_groups": order == "static",
            "true_sequential": True,
        }

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
        placed = by_place(matrices)
        columns = {place: held[0].shape[1] for place, held in placed.items()}
        known = tuple(placed)
        if self._stages[0] != known:  # layers of one kind get their inputs in one order
            self._stages = known, stages_of(layer, run, known)
        stages = self._stages[1]
        few: list[str] = []

        def settle(stage: Stage, leader: Place, seen: Inputs) -> None:
            places = [place for place, first in stage.items() if first == leader]
            group = [matrix for place in places for matrix in placed[place]]
            few.extend(self._group(layer, group, seen, result))

        wide = max(columns.values(), default=0) + 2 * min(columns.values(), default=0)
        alone = all(len(set(stage.values())) == 1 for stage in stages)
        if alone and run.tokens * wide * 4 <= self._room():
            stepwise(layer, run, stages, columns, self._device, settle)
        else:
            for number, stage in enumerate(stages):
                inputs = gather(layer, run, [stage], stages[number + 1 :], columns, self._device)
                for leader, seen in inputs.items():
                    settle(stage, leader, seen)
        if few:
            result.notes.append(
                f"layer {index}: {len(few)} matrices got fewer than {FEWEST_TOKENS} tokens and "
                f"were rounded plainly: {', '.join(few[:3])}{' …' if len(few) > 3 else ''}"
            )
        return result

    def _room(self) -> int:
        """Bytes that activations in the middle of a layer may take."""
        if self._budget is not None:
            return self._budget
        with suppress(OSError, ValueError, IndexError):
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024 // 2
        return ACTIVATIONS

    def _group(
        self, layer: Any, group: Sequence[Matrix], seen: Inputs, result: LayerResult
    ) -> list[str]:
        """Round matrices that share their inputs; returns those that got too few."""
        import torch

        for matrix in group:
            check_finite(matrix, matrix.of(layer).float().cpu().numpy())

        def laid() -> Any:
            return torch.cat([matrix.of(layer).float().T for matrix in group], 1).contiguous()

        enough = seen.tokens >= FEWEST_TOKENS
        if enough:
            every = solve(
                laid, seen.take, self._grid, self._settings, self._threads, group[0].tensor
            )
        else:
            every = rounded(laid().cpu().numpy(), None, self._grid, self._threads)
        begin = 0
        for matrix in group:
            end = begin + matrix.shape[0]
            own = Quantized(
                np.ascontiguousarray(every.codes[:, begin:end]),
                np.ascontiguousarray(every.scales[:, begin:end]),
                np.ascontiguousarray(every.zeros[:, begin:end]),
                every.group_of,
            )
            result.quantized[matrix.tensor] = own
            matrix.of(layer).copy_(torch.from_numpy(own.values()))
            begin = end
        return [] if enough else [matrix.tensor for matrix in group]
