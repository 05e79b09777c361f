"""Adapters made into one adapter, against the weighted sum of what PEFT says each of them adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.adapters.models import load_base, save_base, save_lora, tensors_of
from tests.conftest import write_recipe
from tests.methods import papers

MLP = ["q_proj", "k_proj", "up_proj", "down_proj"]
CASES: dict[str, Sequence[Mapping[str, Any]]] = {
    "equal": [{"r": 4, "target_modules": MLP}] * 2,
    "ranks": [{"r": 4, "target_modules": MLP}, {"r": 7, "target_modules": MLP}],
    "alphas": [
        {"r": 4, "lora_alpha": 16, "target_modules": MLP},
        {"r": 6, "lora_alpha": 3, "target_modules": MLP, "alpha_pattern": {"q_proj": 11}},
    ],
    "rslora": [
        {"r": 9, "use_rslora": True, "target_modules": MLP},
        {"r": 4, "target_modules": MLP, "rank_pattern": {"up_proj": 2}},
    ],
    "modules": [
        {"r": 4, "target_modules": ["q_proj"]},
        {"r": 3, "target_modules": ["up_proj", "embed_tokens", "lm_head"]},
    ],
    "dora": [
        {"r": 4, "use_dora": True, "target_modules": MLP},
        {"r": 5, "use_rslora": True, "target_modules": MLP},
    ],
    "dora embeddings": [
        {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
        {"r": 5, "target_modules": ["q_proj", "embed_tokens"]},
    ],
    "saved beside factors": [
        {"r": 4, "target_modules": ["q_proj", "lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    "saved": [
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ],
}
WEIGHTS = (0.7, -0.4)


def _double(folder: Path, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    """Weights of a base in float64, with an adapter merged by PEFT."""
    model = load_base(folder).double()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
        model = model.merge_and_unload()
    return {n: t.detach() for n, t in model.state_dict().items()}


def _deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    before, after = _double(base), _double(base, adapter)
    return {name: after[name] - before[name] for name in before}


def _relative(ours: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]) -> float:
    lost = sum(float(((ours[n] - true[n]) ** 2).sum()) for n in true)
    return float(np.sqrt(lost / sum(float((true[n] ** 2).sum()) for n in true)))


def _adapters(tmp_path: Path, case: str) -> tuple[Path, list[Path]]:
    base = save_base(tmp_path / "base", "llama")
    made = [
        save_lora(tmp_path / f"lora-{i}", base, seed=i, **keys)
        for i, keys in enumerate(CASES[case], 1)
    ]
    return base, made


def _of_peft(base: Path, adapters: Sequence[Path], kind: str, true: Any) -> str:
    """Relative error of PEFT's own combination, or why there is none."""
    try:
        model = PeftModel.from_pretrained(load_base(base), adapters[0], adapter_name="a")
        model.load_adapter(adapters[1], adapter_name="b")
        model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "c", combination_type=kind)
        model.set_adapter("c")
        merged = model.merge_and_unload(adapter_names=["c"]).state_dict()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        return f"refused ({str(error)[:40]})"
    before = _double(base)
    return f"{_relative({n: merged[n].double() - before[n] for n in true}, true):.1e}"


@pytest.mark.parametrize("case", CASES)
def test_the_exact_sum(
    pack: Callable, tmp_path: Path, case: str, record_property: Callable
) -> None:
    """The result in PEFT adds what the adapters add, weighted; relative error at most 1e-6."""
    base, adapters = _adapters(tmp_path, case)
    parts = [_deltas(base, adapter) for adapter in adapters]
    true = {n: WEIGHTS[0] * parts[0][n] + WEIGHTS[1] * parts[1][n] for n in parts[0]}
    recipe = write_recipe(
        tmp_path / "r.yaml", "task_arithmetic",
        {str(a): {"weight": w} for a, w in zip(adapters, WEIGHTS, strict=True)},
        output="adapter",
        **({"base_model": str(base)} if case.startswith(("dora", "saved")) else {}),
    )  # fmt: skip
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    error = _relative(_deltas(base, tmp_path / "out"), true)
    theirs = [f"{kind} {_of_peft(base, adapters, kind, true)}" for kind in ("linear", "cat", "svd")]
    record_property("combined", f"{case}\t{error:.1e}\t{', '.join(theirs)}")
    assert error <= 1e-6
    merged = pack("merge", "adapter", f"{base}+{tmp_path}/out", "-o", tmp_path / "merged",
                  "--dtype", "float32", "-q")  # fmt: skip
    assert merged.code == 0, merged.err
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert _relative({n: (after[n] - before[n]).double() for n in true}, true) <= 1e-5


@pytest.mark.parametrize("case", ["rslora", "dora"])
def test_truncation_loses_what_it_reports(pack: Callable, tmp_path: Path, case: str) -> None:
    """The reported error is that of the best approximation of the rank (numpy's SVD)."""
    base, adapters = _adapters(tmp_path, case)
    parts = [_deltas(base, adapter) for adapter in adapters]
    true = {n: WEIGHTS[0] * parts[0][n] + WEIGHTS[1] * parts[1][n] for n in parts[0]}
    recipe = write_recipe(
        tmp_path / "r.yaml", "task_arithmetic",
        {str(a): {"weight": w} for a, w in zip(adapters, WEIGHTS, strict=True)},
        output="adapter", base_model=str(base),
    )  # fmt: skip
    ran = pack("merge", recipe, "--rank", 3, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    modules = json.loads(ran.out)["modules"]
    ours = _deltas(base, tmp_path / "out")
    for path, said in modules.items():
        delta = true[f"{path}.weight"].numpy()
        values = np.linalg.svd(delta, compute_uv=False)
        best = np.sqrt((values[3:] ** 2).sum() / (values**2).sum())
        lost = np.linalg.norm(ours[f"{path}.weight"].numpy() - delta) / np.linalg.norm(delta)
        assert said["rank"] == 3
        assert abs(said["relative_error"] - best) < 1e-6
        assert abs(lost - best) < 1e-5


def test_energy_takes_the_fewest_directions(pack: Callable, tmp_path: Path) -> None:
    base, adapters = _adapters(tmp_path, "ranks")
    recipe = write_recipe(
        tmp_path / "r.yaml", "linear", {str(a): {} for a in adapters}, output="adapter", energy=0.8
    )
    ran = pack("merge", recipe, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    parts = [_deltas(base, adapter) for adapter in adapters]
    for path, said in json.loads(ran.out)["modules"].items():
        delta = 0.5 * (parts[0][f"{path}.weight"] + parts[1][f"{path}.weight"]).numpy()
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        share = np.cumsum(squares) / squares.sum()
        assert said["rank"] == int(np.argmax(share >= 0.8)) + 1
        assert said["energy"] == pytest.approx(share[said["rank"] - 1], abs=1e-9)


def test_ties_of_adapters(pack: Callable, tmp_path: Path) -> None:
    """At full rank the result is what the paper's formula gives on the changes of each module."""
    base, adapters = _adapters(tmp_path, "rslora")
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties",
        {str(a): {"weight": w, "density": 0.5} for a, w in zip(adapters, (0.7, 0.4), strict=True)},
        output="adapter", energy=1.0,
    )  # fmt: skip
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    parts = [_deltas(base, adapter) for adapter in adapters]
    ours = _deltas(base, tmp_path / "out")
    for name in (n for n in ours if "proj" in n and parts[0][n].any()):
        deltas = [p[name].numpy().astype(np.float32).astype(np.float64) for p in parts]
        zero = np.zeros(deltas[0].shape)
        expected = papers.ties(zero, deltas, [0.7, 0.4], [0.5, 0.5])
        assert np.abs(ours[name].numpy() - expected).max() < 1e-6 * np.abs(expected).max() + 1e-7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_method": "ties"}, "--rank 32"),
        ({"merge_method": "slerp"}, "cannot make an adapter"),
        ({"rank": 0}, "rank"),
        ({"energy": 1.5}, "energy"),
        ({"output": "adaptor"}, "'model', 'adapter' or 'adapters'"),
        ({"output": "model", "rank": 3}, "goes with 'output: adapter'"),
    ],
)
def test_mistakes(pack: Callable, tmp_path: Path, keys: Mapping[str, Any], message: str) -> None:
    _, adapters = _adapters(tmp_path, "equal")
    method = keys.get("merge_method", "task_arithmetic")
    recipe = write_recipe(
        tmp_path / "r.yaml", method, {str(a): {} for a in adapters},
        **{"output": "adapter", **keys},
    )  # fmt: skip
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_bases(pack: Callable, tmp_path: Path) -> None:
    _, adapters = _adapters(tmp_path, "equal")
    config = adapters[1] / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), "someone/else"))
    recipe = write_recipe(
        tmp_path / "r.yaml", "linear", {str(a): {} for a in adapters}, output="adapter"
    )
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "different bases" in ran.err
    assert "someone/else" in ran.err
