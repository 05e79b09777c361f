"""Selection against sorting, over distributions that break samplers and histograms."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_lite.kernels.jit import TILE
from mergekit_lite.kernels.random import WORDS
from mergekit_lite.methods.base import Chunk, Scratch, TensorContext
from mergekit_lite.methods.sparsify import TopShare

RNG = np.random.default_rng(0)


def _heavy(size: int) -> np.ndarray:
    return RNG.standard_cauchy(size)


DISTRIBUTIONS = {
    "gaussian": lambda n: RNG.standard_normal(n) * 1e-3,
    "heavy tails": _heavy,
    "few values": lambda n: RNG.choice([0.0, 1e-4, -1e-4, 2e-4], n),
    "nearly all zero": lambda n: np.where(RNG.random(n) < 0.999, 0.0, 1.0),
    "all zero": lambda n: np.zeros(n),
    "sorted": lambda n: np.sort(RNG.standard_normal(n)),
    "one band far away": lambda n: np.where(np.arange(n) < n // 2, 1e-8, 1e3) * (1 + RNG.random(n)),
    "denormal": lambda n: RNG.standard_normal(n) * 1e-41,
}


def _select(delta: np.ndarray, density: float, work: type, *, whole_model: bool = False) -> float:
    """Run a `TopShare` as the stream does, in chunks of uneven length."""
    base = np.zeros(delta.size, work)
    models = np.stack([delta.astype(work), -delta.astype(work)])
    context = TensorContext(
        delta.size, 1, 0 if whole_model else 1, 2, np.dtype(work), np.zeros(2, np.uint64)
    )
    top = TopShare(context, np.array([density, density]))
    scratch = Scratch(2, np.dtype(work))
    assert scratch.floats.shape == (6, TILE)
    assert scratch.words.size == WORDS
    step = delta.size if delta.size <= 1 << 15 and not whole_model else 99_991
    index = 0
    while index < top.passes:
        for start in range(0, delta.size, step):
            part = slice(start, start + step)
            chunk = Chunk(models[:, part], base[part], base[:0], start, context, scratch)
            top.observe(index, chunk)
        top.settle(index)
        index += 1
    assert top.thresholds[0] == top.thresholds[1]
    return float(top.thresholds[0])


@pytest.mark.parametrize("density", [1e-6, 0.01, 0.5, 0.93])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [5, 20_000, 100_000, 1_300_000])
def test_the_threshold_is_the_kth_largest(name: str, size: int, density: float) -> None:
    delta = DISTRIBUTIONS[name](size).astype(np.float32)
    rank = max(1, int(density * size))
    assert _select(delta, density, np.float32) == float(np.sort(np.abs(delta))[-rank])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_float64_and_whole_models(name: str) -> None:
    delta = DISTRIBUTIONS[name](50_000)
    expected = np.sort(np.abs(delta))[-25_000]
    assert _select(delta, 0.5, np.float64) == expected
    assert _select(delta, 0.5, np.float64, whole_model=True) == expected
    narrow = delta.astype(np.float32)
    assert _select(narrow, 0.5, np.float32, whole_model=True) == np.sort(np.abs(narrow))[-25_000]


@pytest.mark.parametrize(("density", "threshold"), [(0.0, np.inf), (1.0, 0.0)])
def test_the_ends(density: float, threshold: float) -> None:
    assert _select(RNG.standard_normal(1000), density, np.float32) == threshold
