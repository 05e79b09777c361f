"""Quantized linear layers read bit by bit, from the descriptions of their layouts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def stream(words: Array, bits: int, count: int) -> list[int]:
    """Numbers of a stream of 32-bit words, lowest bits first."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words))
    return [(whole >> (bits * at)) & ((1 << bits) - 1) for at in range(count)]


def gptq(parts: Mapping[str, Array], bits: int, less: int) -> Array:
    """``(out, in)``: weights packed along the inputs, zero points along the outputs."""
    groups, outputs = parts["scales"].shape
    inputs = parts["qweight"].shape[0] * 32 // bits
    zeros = [stream(row, bits, outputs) for row in parts["qzeros"]]
    found = np.empty((outputs, inputs), np.float32)
    for out in range(outputs):
        codes = stream(parts["qweight"][:, out], bits, inputs)
        for at in range(inputs):
            group = int(parts["g_idx"][at])
            scale = np.float32(parts["scales"][group, out])
            found[out, at] = scale * np.float32(codes[at] - (zeros[group][out] + less))
    assert groups == len(zeros)
    return found


def awq(parts: Mapping[str, Array]) -> Array:
    """``(out, in)``: eight outputs in a word, in the order 0 2 4 6 1 3 5 7."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    groups, outputs = parts["scales"].shape
    inputs = len(parts["qweight"])

    def fours(row: Array) -> list[int]:
        found = [0] * outputs
        for word, value in enumerate(row):
            for place, which in enumerate(order):
                found[8 * word + which] = ((int(value) & 0xFFFFFFFF) >> (4 * place)) & 15
        return found

    zeros = [fours(row) for row in parts["qzeros"]]
    result = np.empty((outputs, inputs), np.float32)
    for at in range(inputs):
        codes = fours(parts["qweight"][at])
        group = at * groups // inputs
        for out in range(outputs):
            scale = np.float32(parts["scales"][group, out])
            result[out, at] = scale * np.float32(codes[out] - zeros[group][out])
    return result


def packed(parts: Mapping[str, Array], bits: int) -> Array:
    """compressed-tensors' pack-quantized: along the inputs; zero points along the outputs."""
    outputs, inputs = (int(size) for size in parts["weight_shape"])
    groups = parts["weight_scale"].shape[1]
    found = np.empty((outputs, inputs), np.float32)
    middle = 1 << (bits - 1)
    zeros = np.full((outputs, groups), middle)
    if "weight_zero_point" in parts:
        for group in range(groups):
            zeros[:, group] = stream(parts["weight_zero_point"][:, group], bits, outputs)
    for out in range(outputs):
        codes = stream(parts["weight_packed"][out], bits, inputs)
        for at in range(inputs):
            group = at * groups // inputs
            scale = np.float32(parts["weight_scale"][out, group])
            found[out, at] = scale * np.float32(codes[at] - zeros[out, group])
    return found
