"""Adapters inside merges: the same bytes as merging them first, whatever the run looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.models import load_base, save_base, save_lora, tensors_of
from tests.conftest import digests, write_recipe

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": LINEAR},
    {"r": 7, "target_modules": LINEAR, "use_rslora": True},
    {"r": 5, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
]


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = save_base(
        tmp_path / "base", "llama", torch.bfloat16, hidden_size=64, intermediate_size=300,
        vocab_size=500,
    )  # fmt: skip
    return base, [save_lora(tmp_path / f"lora-{i}", base, i, **k) for i, k in enumerate(LORAS)]


@pytest.mark.parametrize("method", ["ties", "linear", "slerp"])
def test_adapters_in_a_merge_give_the_bytes_of_merging_them_first(
    pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]], method: str
) -> None:
    """TIES(base+a, base+b, base+c), and other methods."""
    base, loras = family
    loras = loras[:2] if method == "slerp" else loras
    parameters = {"t": 0.3} if method == "slerp" else {}
    models = {}
    for i, lora in enumerate(loras):
        models[f"{base}+{lora}"] = tmp_path / f"m-{i}"
        ran = pack("merge", "adapter", f"{base}+{lora}", "-o", tmp_path / f"m-{i}", "--dtype",
                   "float32", "-q")  # fmt: skip
        assert ran.code == 0, ran.err
    each: dict[str, Any] = {} if method == "slerp" else {"weight": 0.6}
    if method == "ties":
        each["density"] = 0.4
    shared: dict[str, Any] = {"dtype": "bfloat16", "parameters": parameters}
    if method == "ties":
        shared["base_model"] = str(base)
    if method == "slerp":
        shared["base_model"] = f"{base}+{loras[0]}"
    direct = write_recipe(tmp_path / "a.yaml", method, dict.fromkeys(models, each), **shared)
    if method == "slerp":
        shared["base_model"] = str(tmp_path / "m-0")
    names = {str(path): each for path in models.values()}
    before = write_recipe(tmp_path / "b.yaml", method, names, **shared)
    for recipe, out in ((direct, "direct"), (before, "before")):
        ran = pack("merge", recipe, "-o", tmp_path / out, "-q")
        assert ran.code == 0, ran.err
    weights = [digests(tmp_path / out)["model.safetensors"] for out in ("direct", "before")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("options", [["--threads", 1], ["--threads", 5], ["--memory", "64MB"]])
def test_threads_and_memory_change_nothing(
    pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]], options: list[object]
) -> None:
    base, loras = family
    models = {f"{base}+{lora}": {"density": 0.5} for lora in loras}
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models, base_model=str(base))
    assert pack("merge", recipe, "-o", tmp_path / "a", "-q").code == 0
    assert pack("merge", recipe, "-o", tmp_path / "b", "-q", *options).code == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_several_adapters_with_weights(
    pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]
) -> None:
    """base + Σ wᵢ·(adapterᵢ(base) - base), in one line and as a mapping, in any order."""
    base, loras = family
    alone = []
    for i, lora in enumerate(loras):
        ran = pack("merge", "adapter", f"{base}+{lora}", "-o", tmp_path / f"m-{i}", "--dtype",
                   "float32", "-q")  # fmt: skip
        assert ran.code == 0, ran.err
        alone.append(tensors_of(tmp_path / f"m-{i}"))
    origin = tensors_of(base)
    weights = (0.7, -0.3, 1.0)
    expected = {
        name: tensor + sum(w * (a[name] - tensor) for w, a in zip(weights, alone, strict=True))
        for name, tensor in origin.items()
    }
    line = f"{base}+0.7*{loras[0]}+-0.3*{loras[1]}+{loras[2]}"
    ran = pack("merge", "adapter", line, "-o", tmp_path / "line", "--dtype", "float32", "-q")
    assert ran.code == 0, ran.err
    found = tensors_of(tmp_path / "line")
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    entry = {
        "model": str(base),
        "adapters": [
            {"path": str(lora), "weight": w} for lora, w in zip(loras, weights, strict=True)
        ],
    }
    for i, model in enumerate([{"model": entry}, entry]):
        recipe = tmp_path / f"r{i}.yaml"
        document = {"merge_method": "passthrough", "models": [model], "dtype": "float32"}
        recipe.write_text(json.dumps(document))
        ran = pack("merge", recipe, "-o", tmp_path / f"mapping-{i}", "-q")
        assert ran.code == 0, ran.err
        one, other = (digests(tmp_path / n) for n in ("line", f"mapping-{i}"))
        assert one["model.safetensors"] == other["model.safetensors"]


def test_the_result_keeps_the_type_of_the_base(
    pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]
) -> None:
    """A bfloat16 base gives bfloat16, rounded once from float32."""
    base, loras = family
    assert pack("merge", "adapter", f"{base}+{loras[0]}", "-o", tmp_path / "a", "-q").code == 0
    ran = pack("merge", "adapter", f"{base}+{loras[0]}", "-o", tmp_path / "b", "--dtype",
               "float32", "-q")  # fmt: skip
    assert ran.code == 0
    exact, rounded = tensors_of(tmp_path / "b"), tensors_of(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in exact.items():
        assert torch.equal(tensor.bfloat16().float(), rounded[name])
    load_base(tmp_path / "a")


def test_the_lock_names_base_and_adapters_once(
    pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]
) -> None:
    base, loras = family
    models = {f"{base}+{lora}": {} for lora in loras}
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models, base_model=str(base))
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    lock = json.loads((tmp_path / "out" / "pack.lock").read_text())
    assert [entry["model"] for entry in lock["inputs"]] == sorted([str(base), *map(str, loras)])
    files = {file["path"] for entry in lock["inputs"][1:] for file in entry["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 513), (64, 1024), (130, 2049)])
@pytest.mark.parametrize("rank", [4, 8, 64])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_kernel(shape: tuple[int, int], rank: int, kind: Any) -> None:
    """Against float64, and the same bits however the rows are cut."""
    from mergekit_lite.kernels.lowrank import add_low_rank

    random = np.random.default_rng(0)
    left = random.standard_normal((shape[0], rank)).astype(kind)
    right = random.standard_normal((rank, shape[1])).astype(kind)
    source = random.standard_normal(shape).astype(kind)
    out = np.empty_like(source)
    add_low_rank(source, left, right, 0.3, out)
    exact = source + kind(0.3) * (left.astype(np.longdouble) @ right)
    assert np.abs(out - exact).max() < (1e-5 if kind is np.float32 else 1e-13)
    for step in (1, 2, 5):
        cut = source.copy()
        for row in range(0, shape[0], step):
            part = slice(row, row + step)
            add_low_rank(cut[part], left[part], right, 0.3, cut[part])
        assert (cut == out).all()


def test_several_models_on_the_command_line(
    pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]
) -> None:
    """`pack merge ties base+a base+b` is the recipe that says so."""
    base, loras = family
    words = [f"{base}+{lora}" for lora in loras]
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {word: {} for word in words}, base_model=str(base)
    )
    assert pack("merge", recipe, "-o", tmp_path / "a", "-q").code == 0
    ran = pack("merge", "ties", *words, "-o", tmp_path / "b", "-q")
    assert ran.code == 0, ran.err
    one, other = (digests(tmp_path / n)["model.safetensors"] for n in "ab")
    assert one == other
    ran = pack("merge", "linear", words[0], "-o", tmp_path / "c", "-q")
    assert ran.code == 0, ran.err
    ran = pack("merge", "tis", *words, "-o", tmp_path / "d")
    assert ran.code == 1
    assert "did you mean 'ties'?" in ran.err
    ran = pack("merge", "adapters", words[0], "-o", tmp_path / "d")
    assert "there is no merge method 'adapters'" in ran.err
