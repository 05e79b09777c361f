"""What goes into the linear layers of a model while it runs: squared inputs, summed by column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.evaluate.forward import LayerwiseModel
from mergekit_lite.merge.run import Progress

__all__ = ["ColumnSums", "squared_inputs", "stacked"]


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
    _one_expert_at_a_time(model.model)
    names = ModelNames(checkpoint)
    found: dict[str, dict[int | None, ColumnSums]] = {}

    def gather(path: str, layer: Any, run: Callable[[], None]) -> None:
        inside = _Recorder(layer)
        with inside:
            run()
        for (parameter, expert), sums in inside.found.items():
            for part in names.find(f"{path}.{parameter}"):
                if part.expert is None:
                    found.setdefault(part.tensor, {})[expert] = sums
                elif part.expert == expert:
                    found.setdefault(part.tensor, {})[None] = sums

    model.hidden(batches, progress, gather).close()
    return found


def _one_expert_at_a_time(model: Any) -> None:
    """Let experts be computed by plain products, which can be looked at."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")


class _Recorder:
    """Looks at every product of inputs with a matrix of a layer."""

    def __init__(self, layer: Any) -> None:
        import torch
        from torch.overrides import TorchFunctionMode

        self.found: dict[tuple[str, int | None], ColumnSums] = {}
        places = _places(layer)

        def look(inputs: Any, weight: Any) -> None:
            place = places.get(weight.data_ptr())
            if place is None:
                return
            rows = inputs.reshape(-1, inputs.shape[-1])
            sums = rows.double().square().sum(0).cpu().numpy()
            held = self.found.get(place)
            if held is None:
                self.found[place] = ColumnSums(sums, len(rows))
            else:
                held.sums = held.sums + sums
                held.tokens += len(rows)

        class Mode(TorchFunctionMode):  # type: ignore[misc]
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func is torch.nn.functional.linear:
                    look(args[0], args[1])
                elif func is torch.addmm:
                    look(args[1], args[2])
                return func(*args, **(kwargs or {}))

        self._mode = Mode()

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)


def _places(layer: Any) -> Mapping[int, tuple[str, int | None]]:
    """Matrices of a layer by their address: the parameter, and the expert of a stack."""
    found: dict[int, tuple[str, int | None]] = {}
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
