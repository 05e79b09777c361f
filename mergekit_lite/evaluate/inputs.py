"""What goes into the linear layers of a model while it runs: squared inputs, summed by column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.evaluate.forward import LayerRun, LayerwiseModel
from mergekit_lite.merge.run import Progress

__all__ = ["ColumnSums", "Place", "one_expert_at_a_time", "squared_inputs", "stacked", "watching"]

Place = tuple[str, int | None]
"""A matrix of a layer: its parameter, and the expert where the parameter holds several."""


@dataclass
class ColumnSums:
    """Inputs of one matrix of weights.

    Attributes:
        sums: ``(columns,)`` float64, sums of squares over tokens.
        tokens: How many came in.
    """

    sums: Array
    tokens: int


def squared_inputs(
    checkpoint: Checkpoint,
    batches: Sequence[Any],
    progress: Progress,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, dict[int | None, ColumnSums]]:
    """Run a model on text, and gather what goes into the matrices of its decoder layers.

    Args:
        checkpoint: The model.
        batches: Token ids, ``(sequences, tokens)`` int64.
        progress: Told how far it is.
        dtype: That it computes with.
        device: torch's device.

    Returns:
        By the tensor's name in the checkpoint, then by expert where one tensor holds several; None
        for a tensor that is one matrix.
    """
    model = LayerwiseModel(checkpoint, dtype, device)
    one_expert_at_a_time(model.model)
    names = model.names
    found: dict[str, dict[int | None, ColumnSums]] = {}

    def gather(path: str, layer: Any, run: LayerRun) -> None:
        inside: dict[Place, ColumnSums] = {}

        def add(place: Place, inputs: Any) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            sums = rows.double().square().sum(0).cpu().numpy()
            held = inside.setdefault(place, ColumnSums(np.zeros_like(sums), 0))
            held.sums = held.sums + sums
            held.tokens += len(rows)

        with watching(layer, add):
            run()
        for (parameter, expert), sums in inside.items():
            for part in names.find(f"{path}.{parameter}"):
                if part.expert is None:
                    found.setdefault(part.tensor, {})[expert] = sums
                elif part.expert == expert:
                    found.setdefault(part.tensor, {})[None] = sums

    model.hidden(batches, progress, gather).close()
    return found


def one_expert_at_a_time(model: Any) -> None:
    """Let experts be computed by plain products, which can be looked at."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")


def watching(
    layer: Any,
    seen: Callable[[Place, Any], None],
    compute: Callable[[Callable[[], Any]], Any] | None = None,
) -> Any:
    """A context in which every product of inputs with a matrix of a layer is seen.

    Args:
        layer: Its parameters are filled, and stay where they are.
        seen: Told, before the product, of the matrix and of its inputs ``(…, columns)``.
        compute: Does what torch is asked for; None for the thread that asks.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    places = _places(layer)

    class Mode(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            pair = None
            if func is torch.nn.functional.linear:
                pair = args[0], args[1]
            elif func is torch.addmm:
                pair = args[1], args[2]
            place = None if pair is None else places.get(pair[1].data_ptr())
            if pair is not None and place is not None:
                seen(place, pair[0])
            if compute is not None:
                return compute(partial(func, *args, **(kwargs or {})))
            return func(*args, **(kwargs or {}))

    return Mode()


def _places(layer: Any) -> Mapping[int, Place]:
    """Matrices of a layer by their address: the parameter, and the expert of a stack."""
    found: dict[int, Place] = {}
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 2:
            found[parameter.data_ptr()] = (name, None)
        elif parameter.ndim == 3:
            for expert in range(parameter.shape[0]):
                found[parameter[expert].data_ptr()] = (name, expert)
    return found


def stacked(parts: Mapping[int | None, ColumnSums], experts: int) -> tuple[Array, Array]:
    """Sums ``(experts, columns)`` and tokens ``(experts,)``; experts that were never asked have 0.

    Args:
        parts: Of one tensor.
        experts: How many it holds.
    """
    columns = next(iter(parts.values())).sums.size
    sums, counts = np.zeros((experts, columns)), np.zeros(experts)
    for expert, one in parts.items():
        sums[expert or 0], counts[expert or 0] = one.sums, one.tokens
    return sums, counts
