"""Blocks of GGUF: bytes of gguf-py, errors below ggml's, values as gguf-py reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from mergekit_lite.kernels.blocks.codebook import NEED_IMPORTANCE
from mergekit_lite.kernels.blocks.types import TYPES, TensorType
from tests import ggml

Array = Any
ROWS, COLUMNS = 48, 1024
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
EXACT = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
CODEBOOK = tuple(name for name in TYPES if name[:3] in ("IQ1", "IQ2", "IQ3"))


def _random() -> np.random.Generator:
    return np.random.default_rng(7)


def _weights() -> dict[str, Array]:
    random = _random()
    shape = (ROWS, COLUMNS)
    gauss = random.standard_normal(shape)
    found = {
        "Gauss": gauss * 0.02,
        "Student, 3 degrees": random.standard_t(3, shape) * 0.02,
        "Laplace": random.laplace(size=shape) * 0.02,
        "beside zero": gauss * 0.01 + 0.03,
        "a tenth": gauss * (random.random(shape) < 0.1),
        "outliers": gauss * np.where(random.random(shape) < 0.002, 2.0, 0.02),
        "rows of all sizes": gauss * np.exp2(random.integers(-12, 3, (ROWS, 1))),
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def _trained(models: Path) -> dict[str, Array]:
    tensors = load_file(models / "base" / "model.safetensors")
    return {
        name: tensors[name].float().numpy()
        for name in sorted(tensors)
        if tensors[name].ndim == 2 and tensors[name].shape[1] % 256 == 0
    }


def _importance(columns: int) -> Array:
    """Squared activations span orders of magnitude, a few columns far above the rest."""
    return np.exp(_random().normal(0, 2, columns)).astype(np.float32)


def _encode(kind: TensorType, values: Array, importance: Array | None = None) -> Array:
    out = np.empty((values.shape[0], kind.row_bytes(values.shape[1])), np.uint8)
    kind.encode(np.ascontiguousarray(values), importance, out)
    return out


def _error(kind: TensorType, stored: Array, values: Array, importance: Array | None) -> float:
    weights = 1.0 if importance is None else importance
    found = ggml.dequantize(kind.number, stored).astype(np.float64)
    return float((weights * (found - values) ** 2).sum())


@pytest.mark.parametrize("name", [*SEARCHED, *WEIGHTED])
@pytest.mark.parametrize("importance", ["alike", "by importance"])
def test_errors(
    name: str, importance: str, example_models: Path, record_property: Callable[[str, str], None]
) -> None:
    """On every tensor at most ggml's weighted squared error, and less in the mean."""
    if name in WEIGHTED and importance == "alike":
        pytest.skip("written bit for bit as ggml does")
    kind = TYPES[name]
    ratios = {}
    for title, values in (_weights() | _trained(example_models)).items():
        weights = _importance(values.shape[1]) if importance == "by importance" else None
        ours = _error(kind, _encode(kind, values, weights), values, weights)
        theirs = _error(kind, ggml.quantize(kind.number, values, weights), values, weights)
        ratios[title] = ours / theirs
        assert ours <= theirs, title
    mean, worst = float(np.mean(list(ratios.values()))), max(ratios.values())
    record_property(
        "blocks", f"{name}, columns {importance}\t{mean:.3f}\t{worst:.3f}\t{len(ratios)}"
    )
    assert mean < 1


def _hard() -> dict[str, Array]:
    random = _random()
    gauss = random.standard_normal((8, COLUMNS))
    whole = random.integers(-9, 9, (8, COLUMNS))
    zeros = np.zeros_like(gauss)
    cases = {
        "Gauss": gauss, "ties": whole, "zeros": zeros, "minus zeros": -zeros,
        "one value": np.full_like(gauss, -0.7), "large": gauss * 1e4, "small": gauss * 1e-9,
        "positive": abs(gauss), "negative": -abs(gauss),
    }  # fmt: skip
    return {name: values.astype(np.float32) for name, values in cases.items()}


@pytest.mark.parametrize("name", EXACT)
def test_the_bytes_of_gguf_py(name: str) -> None:
    kind = TYPES[name]
    for title, values in _hard().items():
        with np.errstate(all="ignore"):
            expected = gguf.quantize(values, gguf.GGMLQuantizationType(kind.number))
        stored = _encode(kind, values)
        assert (stored == np.asarray(expected).view(np.uint8).reshape(stored.shape)).all(), title


@pytest.mark.parametrize("name", TYPES)
def test_values(name: str) -> None:
    """What is read back is what gguf-py reads, bit for bit; sizes and numbers are gguf's."""
    kind = TYPES[name]
    number = gguf.GGMLQuantizationType(kind.number)
    assert number.name == name
    assert gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.block_bytes)
    for title, values in _hard().items():
        stored = _encode(kind, values, _importance(COLUMNS))
        found = np.empty_like(values)
        kind.decode(stored, found)
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(stored, number)
        assert np.isfinite(found).all(), title
        assert (found.view(np.uint32) == np.asarray(expected, np.float32).view(np.uint32)).all()


@pytest.mark.parametrize("name", [*SEARCHED, *WEIGHTED, "Q8_0", "MXFP4", "TQ1_0"])
def test_a_row_depends_on_itself_alone(name: str) -> None:
    """Not on the rows that are encoded with it, nor on where it stands among them."""
    kind = TYPES[name]
    values = _weights()["Student, 3 degrees"]
    for weights in (None, _importance(COLUMNS)):
        whole = _encode(kind, values, weights)
        for rows in (slice(0, 1), slice(5, 12), slice(47, 48)):
            assert (_encode(kind, values[rows], weights) == whole[rows]).all()


@pytest.mark.parametrize("name", CODEBOOK)
def test_codebooks(name: str) -> None:
    """Through ggml itself; with an importance matrix where it wants one."""
    from mergekit_lite.errors import PackError

    kind = TYPES[name]
    values = _weights()["Gauss"][:4]
    importance = _importance(COLUMNS)
    expected = ggml.quantize(kind.number, values, importance)
    assert (_encode(kind, values, importance) == expected).all()
    if name in NEED_IMPORTANCE:
        with pytest.raises(PackError, match="needs an importance matrix"):
            _encode(kind, values)


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite.errors import PackError
    from mergekit_lite.kernels.blocks import ggml as place

    monkeypatch.setattr(place, "find_spec", lambda _: None)
    with pytest.raises(PackError, match="xllamacpp is not installed") as caught:
        _encode(TYPES["IQ3_S"], _weights()["Gauss"][:4])
    assert "pack-models[llama-cpp]" in caught.value.hint
