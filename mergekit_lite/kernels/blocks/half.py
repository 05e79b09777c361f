"""Float16 inside kernels, which have no arithmetic for it: scales of blocks are stored so."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_lite.kernels.cast import bits_of, float_of
from mergekit_lite.kernels.jit import inner

__all__ = ["LARGEST", "from_half", "rounded", "to_half"]

LARGEST = np.float32(65504.0)
"""The largest finite float16; larger numbers become it."""

_NORMAL = np.uint32(0x38800000)  # bits of 2**-14
_REBIAS = np.uint32(0x38000000)
_HALF = np.uint32(0x3F000000)  # bits of 0.5


@inner
def to_half(value: Any) -> Any:
    """The bits, uint32, of a finite float32 rounded to nearest even."""
    bits = bits_of(np.float32(value))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = float_of(bits & np.uint32(0x7FFFFFFF))
    if size > LARGEST:
        size = LARGEST
    bits = bits_of(size)
    if bits < _NORMAL:
        # The last bit of a sum with 0.5 is worth 2**-24, as that of a subnormal float16.
        return sign | (bits_of(np.float32(size + np.float32(0.5))) - _HALF)
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    return sign | ((bits + np.uint32(0xFFF) + odd - _REBIAS) >> np.uint32(13))


@inner
def from_half(bits: Any) -> Any:
    """The float32 of a finite float16's bits."""
    wide = np.uint32(bits)
    size = (wide & np.uint32(0x7FFF)) << np.uint32(13)
    if wide & np.uint32(0x7C00):
        value = float_of(size + _REBIAS)
    else:
        value = np.float32(np.float32(wide & np.uint32(0x3FF)) * np.float32(2.0**-24))
    return -value if wide & np.uint32(0x8000) else value


@inner
def rounded(value: Any) -> Any:
    """A float32 after it has been a float16."""
    return from_half(to_half(value))
