"""What goes into the matrices of a layer: Gram matrices, mean sizes, and who shares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lite.evaluate.forward import Enough, LayerRun
from mergekit_lite.evaluate.inputs import Place, watching

__all__ = ["Inputs", "Stage", "gather", "stages_of", "stepwise"]

_PANELS = 4
_LARGE = 1024


@dataclass
class Inputs:
    """The inputs of one or several matrices.

    Attributes:
        gram: torch's ``(in, in)`` float32, Σ x xᵀ.
        sizes: torch's ``(in,)`` float32, Σ |x|.
        largest: torch's ``(in,)`` float32, the largest |x|.
        tokens: How many came.
    """

    gram: Any
    sizes: Any
    largest: Any
    tokens: int

    @classmethod
    def none(cls, columns: int, device: str) -> Inputs:
        """Before the first token."""
        import torch

        gram = torch.zeros(columns, columns, device=device)
        return cls(gram, gram.new_zeros(columns), gram.new_zeros(columns), 0)

    def add(self, rows: Any) -> None:
        """Add tokens.

        Args:
            rows: ``(tokens, in)``.
        """
        import torch

        rows = rows.float()
        self.tokens += len(rows)
        sizes = rows.abs()
        self.sizes += sizes.sum(0)
        if len(rows):
            torch.maximum(self.largest, sizes.amax(0), out=self.largest)
        columns = rows.shape[1]
        if columns < _LARGE:
            self.gram.addmm_(rows.T, rows)
            return
        # What lies above the diagonal is that below it: only panels on and below are computed.
        step = -(-columns // _PANELS)
        for first in range(0, columns, step):
            part = rows[:, first : first + step]
            self.gram[first:, first : first + step].addmm_(rows[:, first:].T, part)

    def take(self) -> Any:
        """The Gram matrix with both of its halves, for who lets it go first; there is none then."""
        found, self.gram = self.whole(), None
        return found

    def whole(self) -> Any:
        """The Gram matrix with both of its halves."""
        columns = self.gram.shape[0]
        if columns < _LARGE:
            return self.gram
        step = -(-columns // _PANELS)
        for first in range(0, columns, step):
            last = first + step
            self.gram[first:last, last:] = self.gram[last:, first:last].T
        return self.gram


Stage = Mapping[Place, Place]
"""Matrices whose inputs are known at the same time: by place, who has the same inputs first."""


def stages_of(layer: Any, run: LayerRun, wanted: Sequence[Place]) -> list[Stage]:
    """The order in which a layer's matrices get inputs, found by running one batch.

    Matrices that get the same inputs are one after another in it; experts of one kind are one
    stage.

    Args:
        layer: Filled.
        run: Runs batches through it.
        wanted: The matrices; those that are not reached are in the last stage.
    """
    order: list[tuple[Place, Place]] = []
    known = set(wanted)
    seen: set[Place] = set()
    last: list[Any] = [None, None]

    def look(place: Place, inputs: Any) -> None:
        if place not in known or place in seen:
            return
        if inputs is not last[0]:
            last[:] = [inputs, place]
        seen.add(place)
        order.append((place, last[1]))

    with watching(layer, look):
        run.look(1)
    stages: list[dict[Place, Place]] = []
    heads: list[str] = []
    for place, leader in order:
        if leader[0] not in heads:
            heads.append(leader[0])
            stages.append({})
        stages[heads.index(leader[0])][place] = leader
    by_parameter = {place[0]: stage for stage in stages for place in stage}
    for place in wanted:
        if place not in seen:
            stage = by_parameter.get(place[0])
            if stage is None:
                stage = by_parameter[place[0]] = {}
                stages.append(stage)
            stage[place] = place
    return list(stages)


def gather(
    layer: Any,
    run: LayerRun,
    stages: Sequence[Stage],
    later: Sequence[Stage],
    columns: Mapping[Place, int],
    device: str,
) -> dict[Place, Inputs]:
    """Run all batches, and gather what goes into the matrices of stages.

    Args:
        layer: Filled.
        run: Runs batches through it.
        stages: Those that are wanted.
        later: Those that come after them; a batch ends where one of them would begin.
        columns: Inputs of each matrix.
        device: torch's.

    Returns:
        By the first matrix that gets them.
    """
    leaders = {place: leader for stage in stages for place, leader in stage.items()}
    behind = {place for stage in later for place in stage}
    found = {
        leader: Inputs.none(columns[leader], device) for leader in dict.fromkeys(leaders.values())
    }

    def look(place: Place, inputs: Any) -> None:
        if place in behind:
            raise Enough
        if leaders.get(place) == place:
            found[place].add(inputs.reshape(-1, inputs.shape[-1]))

    with watching(layer, look):
        run.look()
    return found


def stepwise(
    layer: Any,
    run: LayerRun,
    stages: Sequence[Stage],
    columns: Mapping[Place, int],
    device: str,
    settle: Callable[[Stage, Place, Inputs], None],
) -> None:
    """Run all batches once, all of them waiting before each stage until its matrices are settled.

    Args:
        layer: Filled.
        run: Runs batches through it.
        stages: All of them, each of matrices that share their inputs.
        columns: Inputs of each matrix.
        device: torch's.
        settle: Gets a stage, its first matrix and what goes in, and changes the layer.
    """
    leaders = [next(iter(stage.values())) for stage in stages]
    number = {leader: index for index, leader in enumerate(leaders)}
    found: list[Inputs | None] = [None] * len(stages)

    def look(place: Place, inputs: Any) -> None:
        index = number.get(place)
        if index is None:
            return
        held = found[index]
        if held is None:
            held = found[index] = Inputs.none(columns[place], device)
        known = held
        lockstep.ask(lambda: known.add(inputs.reshape(-1, inputs.shape[-1])))
        lockstep.pause()

    inside = lambda: watching(layer, look, lambda work: lockstep.ask(work))  # noqa: E731
    with run.stepwise(inside) as lockstep:
        for index, stage in enumerate(stages):
            lockstep.step()
            held = found[index]
            if held is None:  # nothing goes into it on this text
                held = Inputs.none(columns[leaders[index]], device)
            settle(stage, leaders[index], held)
            found[index] = None
        lockstep.step()
