"""Every cast against torch's, over all bit patterns where there are few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.dtypes import DTYPES
from mergekit_lite.kernels.cast import decode, encode

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F32": torch.float32,
    "F64": torch.float64,
}
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, 6e-8, 448.0, 464.0, 480.0, 57344.0, 61439.0, 61440.0, 65504.0,
         65519.0, 65520.0, 3.38e38, 3.4e38, np.inf, -np.inf, np.nan]  # fmt: skip


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_decoding_every_pattern(name: str) -> None:
    dtype = DTYPES[name]
    patterns = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    for work in (np.float32, np.float64):
        out = np.empty(patterns.size, work)
        decode(patterns.view(dtype.storage), dtype, out)
        expected = torch.from_numpy(patterns.copy()).view(TORCH[name]).float().numpy()
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F32", "F64"])
def test_encoding_float32(name: str) -> None:
    dtype = DTYPES[name]
    rng = np.random.default_rng(0)
    random = rng.standard_normal(200_000) * np.exp(rng.uniform(-30, 30, 200_000))
    values = np.concatenate([random, EDGES]).astype(np.float32)
    if dtype.itemsize == 1:  # all middles between neighbours
        codes = np.arange(127, dtype=np.uint8)
        exact = torch.from_numpy(codes).view(TORCH[name]).float().numpy()
        finite = exact[np.isfinite(exact)]
        values = np.concatenate([values, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
    out = np.empty(values.size, dtype.storage)
    encode(values, dtype, out)
    back = np.empty(values.size, np.float64)
    decode(out, dtype, back)
    expected = torch.from_numpy(values).to(TORCH[name]).double().numpy()
    np.testing.assert_array_equal(back, expected)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.floats(width=64), min_size=1, max_size=50))
def test_float64_is_rounded_once(numbers: list[float]) -> None:
    """To bfloat16 from float64, checked against the two neighbours in exact arithmetic."""
    values = np.array(numbers)
    out = np.empty(values.size, np.uint16)
    encode(values, DTYPES["BF16"], out)
    got = (out.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    for value, result, bits in zip(values, got, out, strict=True):
        if np.isnan(value):
            assert np.isnan(result)
            continue
        largest = float.fromhex("0x1.fep127")
        if abs(value) >= float.fromhex("0x1.ffp127"):
            assert np.isinf(result)
            continue
        if abs(value) > largest:
            assert abs(result) == largest
            continue
        for step in (-1, 1):
            other = int(bits) + step
            if 0 <= other <= 0xFFFF and (other & 0x7F80) != 0x7F80 and (other ^ int(bits)) < 0x8000:
                neighbour = float(np.array([other << 16], np.uint32).view(np.float32)[0])
                distance, theirs = abs(value - result), abs(value - neighbour)
                assert distance < theirs or (distance == theirs and int(bits) % 2 == 0)
