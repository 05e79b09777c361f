"""Codes of a model that is quantized already, which a graph takes over as they are."""

from __future__ import annotations

import numpy as np

from exporters.linears.quantized import Quantized
from exporters.onnx.rewrite import Codes
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.checkpoint.quantized import QuantizedCheckpoint
from mergekit_lite.evaluate.parts import Parts

__all__ = ["codes_of"]

_TOP = 15


def codes_of(checkpoint: Checkpoint, parts: Parts) -> Codes:
    """What gives the codes of 4 bits that a parameter has.

    Args:
        checkpoint: The model.
        parts: Where its parameters lie.
    """
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return lambda _: None

    def codes(parameter: str) -> Quantized | None:
        places = parts.names.find(parameter)
        if len(places) != 1 or places[0].expert is not None:
            return None
        found = checkpoint.grid(places[0].tensor)
        if found is None:
            return None
        values, scales, zeros, group_of = found
        low = min(int(values.min()), int(zeros.min()), 0)
        values, zeros = values.astype(np.int16) - low, zeros.astype(np.int16) - low
        if max(int(values.max()), int(zeros.max())) > _TOP:
            return None
        return Quantized(
            values.astype(np.uint8), scales.astype(np.float32), zeros.astype(np.uint8),
            group_of.astype(np.int32),
        )  # fmt: skip

    return codes
