"""Formats whose linear layers are quantized, and their usual schemes; imports nothing large."""

from __future__ import annotations

from typing import Literal

__all__ = ["BUILT_IN", "FORMATS", "ORDERS", "SCHEMES", "TARGETS", "WEIGHTS_ALONE", "Order"]

Order = Literal["static", "groups", "columns", "none"]
ORDERS: tuple[Order, ...] = ("static", "groups", "columns", "none")
"""In which order GPTQ rounds columns; see `exporters.gptq.solve.Settings`."""

WEIGHTS_ALONE = frozenset({("int8", "w8a16"), ("bnb", "nf4")})
"""Targets with schemes for which a model is never run."""

BUILT_IN = "built-in text"
"""Name of the text that comes along, in locks."""


TARGETS = ("gptq", "awq", "int8", "bnb")
FORMATS = ("gptq", "awq", "compressed-tensors")
SCHEMES = {
    "gptq": {
        "w4g128": "4 bits, a scale for 128 inputs, symmetric (w4g128-asym: with zero points)",
        "w4g64, w4g32": "finer groups",
        "w4": "a scale for a whole row",
        "w3g128, w2g64": "3 bits, 2 bits",
        "w8g128": "8 bits",
    },
    "awq": {
        "w4g128": "4 bits, a scale and a zero point for 128 inputs",
        "w4g64, w4g32": "finer groups",
    },
    "int8": {
        "w8a16": "weights of 8 bits, a scale for a row",
        "w8a8": "weights and inputs of 8 bits; SmoothQuant where there is calibration",
    },
    "bnb": {
        "nf4": "4 bits of a normal distribution, a scale for 64, for bitsandbytes",
    },
}
"""Usual schemes, with what they are."""
