"""Where scales of a layer's channels can go: into the norm or the linear layer before.

Columns of a matrix may be multiplied by any scales if whatever gives its inputs is divided by them.
What does is not looked up by family: for each group of matrices that share their inputs, the norms
and matrices before it that have the size are tried, with random scales on one batch. Where the
layer still gives what it gave, the pair holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from exporters.linears.gram import Stage
from mergekit_lite.evaluate.forward import LayerRun
from mergekit_lite.evaluate.inputs import Place

__all__ = [
    "Fold", "Linear", "Norm", "Producer", "apply_fold", "columns_of", "differs", "expanded",
    "find_folds",
]  # fmt: skip

_SAME = 2e-3
"""Largest relative difference of a layer's output that is rounding; a wrong pair is far off."""


@dataclass(frozen=True)
class Norm:
    """A norm gives the inputs.

    Attributes:
        path: Of the module below the layer.
        plus_one: Whether it multiplies by one more than its weight.
    """

    path: str
    plus_one: bool


@dataclass(frozen=True)
class Linear:
    """Rows of a matrix give the inputs, one each.

    Attributes:
        place: The matrix.
        start: First row.
        stop: One past the last.
        repeat: How many inputs in a row of heads each row gives (grouped-query attention).
        head: Rows of a head; what is repeated are whole heads.
    """

    place: Place
    start: int
    stop: int
    repeat: int = 1
    head: int = 1


Producer = Norm | Linear


@dataclass(frozen=True)
class Fold:
    """A group of matrices and what gives their inputs.

    Attributes:
        consumers: All places whose inputs they are.
        producer: What gives them.
    """

    consumers: tuple[Place, ...]
    producer: Producer

    @property
    def channels(self) -> int | None:
        """How many scales are free; None for one for each input."""
        producer = self.producer
        return producer.stop - producer.start if isinstance(producer, Linear) else None


def expanded(producer: Producer, scales: Any) -> Any:
    """Scales of all inputs, from those of what gives them."""
    if isinstance(producer, Norm) or producer.repeat == 1:
        return scales
    heads = scales.reshape(-1, 1, producer.head)
    return heads.expand(-1, producer.repeat, -1).reshape(-1)


def columns_of(layer: Any, place: Place) -> Any:
    """A view ``(…, out, in)`` of the weights at a place."""
    found = layer.get_parameter(place[0])
    owner = layer.get_submodule(place[0].rpartition(".")[0])
    if place[1] is not None:
        found = found[place[1]]
    return found.T if type(owner).__name__ == "Conv1D" else found


def apply_fold(layer: Any, fold: Fold, scales: Any, rounding: Any = None) -> None:
    """Divide what gives the inputs by scales, and multiply the columns.

    Args:
        layer: Filled; changed.
        fold: Where.
        scales: ``(channels,)`` float32.
        rounding: Rounds a norm's weight as its file stores it; the columns are multiplied by what
            the norm was really divided by, so that its rounding costs nothing.
    """
    import torch

    producer = fold.producer
    if isinstance(producer, Norm):
        norm = layer.get_submodule(producer.path)
        one = 1.0 if producer.plus_one else 0.0
        before = norm.weight + one
        after = before / scales - one
        if rounding is not None:
            after = rounding(after)
            scales = torch.where(after + one == 0, scales, before / (after + one))
        norm.weight.copy_(after)
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(scales)
    else:
        rows = columns_of(layer, producer.place)[producer.start : producer.stop]
        rows.div_(scales[:, None])
        owner = layer.get_submodule(producer.place[0].rpartition(".")[0])
        if producer.place[1] is None and getattr(owner, "bias", None) is not None:
            owner.bias[producer.start : producer.stop].div_(scales)
    wide = expanded(producer, scales)
    for place in fold.consumers:
        columns_of(layer, place).mul_(wide)


def find_folds(
    layer: Any,
    run: LayerRun,
    stages: Sequence[Stage],
    norms_only: bool = False,
) -> list[Fold]:
    """Find what gives the inputs of each group, by trying.

    Args:
        layer: Filled; left as it was.
        run: Runs batches through it.
        stages: In the order in which matrices get their inputs.
        norms_only: Whether matrices that give inputs are left alone.

    Returns:
        One for each group for which something was found.
    """
    order = [(stage, leader) for stage in stages for leader in dict.fromkeys(stage.values())]
    base = run.sample()
    found: list[Fold] = []
    known: dict[tuple[str, ...], Fold | None] = {}
    for stage, leader in order:
        places = tuple(place for place, first in stage.items() if first == leader)
        # Experts are alike: what holds for the first is taken for all, and checked with them.
        key = tuple(dict.fromkeys(place[0] for place in places))
        if leader[1] is not None and key in known:
            like = known[key]
            if like is not None and isinstance(like.producer, Linear):
                found.append(_for_expert(like, leader[1]))
            continue
        columns = columns_of(layer, leader).shape[-1]
        fold = None
        for candidate in _candidates(layer, stages, stage, places, columns):
            if norms_only and not isinstance(candidate.producer, Norm):
                continue
            if _holds(layer, run, candidate, base):
                fold = candidate
                break
        known[key] = fold
        if fold is not None:
            found.append(fold)
    return found


def _for_expert(fold: Fold, expert: int) -> Fold:
    producer = fold.producer
    assert isinstance(producer, Linear)  # noqa: S101 (asked before)
    own = Linear((producer.place[0], expert), producer.start, producer.stop)
    return Fold(tuple((place[0], expert) for place in fold.consumers), own)


def _candidates(
    layer: Any,
    stages: Sequence[Stage],
    stage: Stage,
    places: tuple[Place, ...],
    columns: int,
) -> Iterator[Fold]:
    experts = places[0][1] is not None
    every = places
    if experts:
        # All experts, and whatever routes to them, see the same norm.
        every = tuple((parameter, None) for parameter in _reading(layer, places, columns))
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 1 and len(weight) == columns:
            for plus_one in (False, True):
                yield Fold(every, Norm(name, plus_one))
    earlier = stages[: list(stages).index(stage)]
    before = [place for one in earlier for place in one if not experts or place[1] == places[0][1]]
    for place in reversed(before):
        rows = columns_of(layer, place).shape[0]
        for start in range(rows - columns, -1, -columns):
            yield Fold(places, Linear(place, start, start + columns))
        for head, count in _heads(layer, columns):
            if rows >= count * head and not columns % (count * head):
                repeat = columns // (count * head)
                yield Fold(places, Linear(place, rows - count * head, rows, repeat, head))


def _reading(layer: Any, places: Sequence[Place], columns: int) -> list[str]:
    """Parameters that may read what experts read: theirs, and matrices that no expert has."""
    found = [places[0][0]]
    inside = places[0][0].rpartition(".")[0].rpartition(".")[0]
    for name, parameter in layer.named_parameters():
        near = not inside or name.startswith(f"{inside}.")
        if (
            near
            and name not in found
            and parameter.ndim in (2, 3)
            and (parameter.shape[-1] == columns)
        ):
            found.append(name)
    return found


def _heads(layer: Any, columns: int) -> Iterator[tuple[int, int]]:
    """Size of a head and number of heads that share keys and values."""
    config = next((m.config for m in layer.modules() if hasattr(m, "config")), None)
    heads = getattr(config, "num_attention_heads", None)
    count = getattr(config, "num_key_value_heads", None)
    if heads and count and count != heads and not columns % heads:
        yield columns // heads, count


@contextmanager
def _restored(layer: Any, fold: Fold) -> Iterator[None]:
    """Whatever a fold changes is as before afterwards."""
    names = {place[0] for place in fold.consumers}
    producer = fold.producer
    path = producer.path if isinstance(producer, Norm) else producer.place[0].rpartition(".")[0]
    names |= {f"{path}.{n}" for n, _ in layer.get_submodule(path).named_parameters(recurse=False)}
    kept = {name: layer.get_parameter(name).clone() for name in names}
    try:
        yield
    finally:
        for name, value in kept.items():
            layer.get_parameter(name).copy_(value)


def _holds(layer: Any, run: LayerRun, fold: Fold, base: Any) -> bool:
    import torch

    channels = fold.channels
    if channels is None:
        channels = columns_of(layer, fold.consumers[0]).shape[-1]
    generator = torch.Generator().manual_seed(channels)
    device = layer.get_parameter(fold.consumers[0][0]).device
    scales = torch.empty(channels).uniform_(0.5, 2.0, generator=generator).to(device)
    with _restored(layer, fold):
        try:
            apply_fold(layer, fold, scales)
        except RuntimeError:  # sizes that fit by chance only
            return False
        return differs(run.sample(), base) < _SAME


def differs(found: Any, base: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - base).abs().max() / base.abs().max().clamp(min=1e-30))
