"""Every method, through the whole program, against float64 transcriptions of its paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import load, random_models, write_recipe
from tests.methods import papers

SHAPES = {
    "embed.weight": (131, 48),
    "layers.0.conv.weight": (6, 5, 3),
    "layers.0.up.weight": (160, 48),
    "layers.0.norm.weight": (48,),
    "layers.0.scale": (1,),
    "layers.1.conv.weight": (6, 5, 3),
    "layers.1.up.weight": (160, 48),
    "layers.1.norm.weight": (48,),
    "layers.1.scale": (1,),
}
WEIGHTS = (1.0, 0.7, -0.4)
DENSITIES = (0.5, 0.3, 0.9)
PARAMETERS = {
    n: {"weight": w, "density": p} for n, w, p in zip("abc", WEIGHTS, DENSITIES, strict=True)
}
ONLY_WEIGHTS = {n: {"weight": w} for n, w in zip("abc", WEIGHTS, strict=True)}


def _expected(method: str, name: str, base: np.ndarray, models: list[np.ndarray]) -> np.ndarray:
    if method == "linear":
        return papers.linear(models, WEIGHTS)
    if method == "slerp":
        return papers.slerp(base, models[0], 0.3)
    if method == "task_arithmetic":
        return papers.task_arithmetic(base, models, WEIGHTS, 0.8)
    if method == "ties":
        return papers.ties(base, models, WEIGHTS, DENSITIES, 0.8)
    masks = [
        papers.drop_mask(7, m, name, base.size, p) for m, p in zip("abc", DENSITIES, strict=True)
    ]
    return papers.dare(
        base, models, WEIGHTS, DENSITIES, masks, signs=method == "dare_ties", lam=0.8
    )


def _recipe(tmp_path: Path, method: str, dtype: str) -> Path:
    keys: dict[str, object] = {"dtype": dtype, "seed": 7}
    if method == "linear":
        return write_recipe(tmp_path / "r.yaml", method, ONLY_WEIGHTS, **keys)
    keys["base_model"] = "base"
    if method == "slerp":
        return write_recipe(
            tmp_path / "r.yaml", method, {"base": {}, "a": {}}, parameters={"t": 0.3}, **keys
        )
    models = ONLY_WEIGHTS if method == "task_arithmetic" else PARAMETERS
    return write_recipe(tmp_path / "r.yaml", method, models, parameters={"lambda": 0.8}, **keys)


METHODS = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]


def _merge(pack: Callable, tmp_path: Path, method: str, dtype: str) -> dict[str, np.ndarray]:
    recipe = _recipe(tmp_path, method, dtype)
    ran = pack("merge", method, recipe, "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    return load(tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_within_one_millionth(pack: Callable, tmp_path: Path, method: str) -> None:
    random_models(tmp_path, shapes=SHAPES)
    merged = _merge(pack, tmp_path, method, "float32")
    sources = {n: load(tmp_path / n) for n in ("base", "a", "b", "c")}
    assert merged.keys() == SHAPES.keys()
    for name, value in merged.items():
        base, *models = (sources[n][name].astype(np.float64) for n in ("base", "a", "b", "c"))
        expected = _expected(method, name, base, models)
        error = np.abs(value - expected).max() / np.abs(expected).max()
        assert error <= 1e-6, (name, error)


@pytest.mark.parametrize("method", METHODS)
def test_float64_is_exact_to_its_own_precision(pack: Callable, tmp_path: Path, method: str) -> None:
    random_models(tmp_path, shapes=SHAPES, dtype=torch.float64)
    from safetensors.torch import load_file

    recipe = _recipe(tmp_path, method, "float64")
    assert pack("merge", method, recipe, "-o", tmp_path / "out", "-q").code == 0
    read = lambda n: load_file(tmp_path / n / "model.safetensors")  # noqa: E731
    sources = {n: read(n) for n in ("base", "a", "b", "c")}
    for name, value in read("out").items():
        assert value.dtype == torch.float64
        base, *models = (sources[n][name].numpy() for n in ("base", "a", "b", "c"))
        expected = _expected(method, name, base, models)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_correctly_rounded(pack: Callable, tmp_path: Path, method: str) -> None:
    """At least 99.9 % of the elements are the bfloat16 that is nearest to the exact result."""
    shapes = {"embed.weight": (211, 96), "layers.0.up.weight": (96, 211)}
    random_models(tmp_path, shapes=shapes, dtype=torch.bfloat16)
    merged = _merge(pack, tmp_path, method, "bfloat16")
    sources = {n: load(tmp_path / n) for n in ("base", "a", "b", "c")}
    right = count = 0
    for name, value in merged.items():
        base, *models = (sources[n][name].astype(np.float64) for n in ("base", "a", "b", "c"))
        expected = torch.from_numpy(_expected(method, name, base, models)).bfloat16()
        right += int((torch.from_numpy(value) == expected.float()).sum())
        count += value.size
    assert right / count >= 0.999


def test_ties_trims_large_tensors_as_small_ones(pack: Callable, tmp_path: Path) -> None:
    """Above a million elements the threshold is found by sampling; it is the same threshold."""
    shapes = {"layers.0.up.weight": (1400, 1000)}
    random_models(tmp_path, shapes=shapes)
    merged = _merge(pack, tmp_path, "ties", "float32")["layers.0.up.weight"]
    base, *models = (
        load(tmp_path / n)["layers.0.up.weight"].astype(np.float64) for n in ("base", "a", "b", "c")
    )
    # In float32 two deltas may be equal that differ in float64, so trim what float32 sees.
    deltas = [papers.trim((m.astype(np.float32) - base.astype(np.float32)).astype(float), p)
              for m, p in zip(models, DENSITIES, strict=True)]  # fmt: skip
    expected = papers.merge_signs(base, deltas, WEIGHTS, 0.8, normalize=True)
    assert np.abs(merged - expected).max() / np.abs(expected).max() <= 1e-6


def test_ties_global_trims_over_the_whole_model(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path, shapes=SHAPES)
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {n: {"density": 0.4} for n in "abc"},
        base_model="base", parameters={"trim": "global"}, dtype="float32",
    )  # fmt: skip
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    sources = {n: load(tmp_path / n) for n in ("base", "a", "b", "c")}
    flat = {n: np.concatenate([t[k].ravel() for k in SHAPES]) for n, t in sources.items()}
    deltas = [
        papers.trim((flat[n] - flat["base"]).astype(np.float64), 0.4) for n in ("a", "b", "c")
    ]
    expected = papers.merge_signs(flat["base"].astype(float), deltas, [1.0] * 3, 1.0, True)
    merged = load(tmp_path / "out")
    got = np.concatenate([merged[k].ravel() for k in SHAPES])
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


def test_slerp_by_rows(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path, shapes=SHAPES)
    # An angle that is no straight line, different in each row.
    recipe = write_recipe(
        tmp_path / "r.yaml", "slerp", {"a": {}}, base_model="b",
        parameters={"t": 0.4, "row_wise": True}, dtype="float32",
    )  # fmt: skip
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    first, second, merged = (load(tmp_path / n) for n in ("b", "a", "out"))
    for name in ("embed.weight", "layers.0.conv.weight"):
        columns = SHAPES[name][-1]
        rows = zip(
            first[name].reshape(-1, columns).astype(float),
            second[name].reshape(-1, columns).astype(float),
            merged[name].reshape(-1, columns),
            strict=True,
        )
        for a, b, got in rows:
            np.testing.assert_allclose(got, papers.slerp(a, b, 0.4), rtol=2e-5, atol=1e-7)


def test_slerp_of_unlike_models_is_no_line(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path / "x", names="", shapes=SHAPES, seed=1)
    random_models(tmp_path / "y", names="", shapes=SHAPES, seed=2)
    recipe = write_recipe(
        tmp_path / "r.yaml", "slerp", {"y/base": {}}, base_model="x/base",
        parameters={"t": 0.5}, dtype="float32",
    )  # fmt: skip
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    first, second, merged = (load(tmp_path / n) for n in ("x/base", "y/base", "out"))
    name = "layers.0.up.weight"
    expected = papers.slerp(first[name].astype(float), second[name].astype(float), 0.5)
    line = (first[name] + second[name]) / 2
    assert np.abs(merged[name] - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.abs(merged[name] - line).max() > 0.1 * np.abs(line).max()


def test_l1_rescaling_keeps_the_norm(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path, names="a", shapes=SHAPES)
    for method in ("dare_linear", "ties"):
        recipe = write_recipe(
            tmp_path / "r.yaml", method, {"a": {"density": 0.3}}, base_model="base",
            parameters={"rescale": "l1"}, dtype="float32",
        )  # fmt: skip
        assert pack("merge", recipe, "-o", tmp_path / method, "-q").code == 0
        base, tuned, merged = (load(tmp_path / n) for n in ("base", "a", method))
        for name in ("embed.weight", "layers.1.up.weight"):
            kept = np.abs(merged[name] - base[name]).sum(dtype=float)
            whole = np.abs(tuned[name] - base[name]).sum(dtype=float)
            assert kept == pytest.approx(whole, rel=1e-4)


def test_dare_keeps_the_expected_share(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path, names="a", shapes={"layers.0.up.weight": (1000, 1000)})
    recipe = write_recipe(
        tmp_path / "r.yaml",
        "dare_linear",
        {"a": {"density": 0.2}},
        base_model="base",
        dtype="float32",
    )
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    base, merged = load(tmp_path / "base"), load(tmp_path / "out")
    share = float((merged["layers.0.up.weight"] != base["layers.0.up.weight"]).mean())
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / 1e6) ** 0.5 + 1e-3


def test_passthrough_copies_and_scales(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path, names="a", dtype=torch.bfloat16)
    recipe = write_recipe(
        tmp_path / "r.yaml", "passthrough",
        {"a": {"scale": [{"filter": "norm", "value": 0.5}, {"value": 1.0}]}},
    )  # fmt: skip
    assert pack("merge", "passthrough", recipe, "-o", tmp_path / "out", "-q").code == 0
    source, merged = load(tmp_path / "a"), load(tmp_path / "out")
    for name, value in merged.items():
        np.testing.assert_array_equal(value, source[name] * (0.5 if "norm" in name else 1.0))
