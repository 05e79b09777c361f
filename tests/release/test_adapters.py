"""Bundles of adapters: what PEFT and llama.cpp make of them beside the base."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, PeftModel, PrefixTuningConfig, get_peft_model

from tests import llama_cpp
from tests.adapters.models import load_base, randomise, save_base, save_lora
from tests.conftest import digests

TOKENS = [3, 17, 60, 2, 41, 5, 5, 79]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = save_base(tmp_path / "base", "llama", **SIZES)
    keys: list[dict[str, Any]] = [
        {"r": 4, "target_modules": ["q_proj", "up_proj"]},
        {"r": 20, "lora_alpha": 7, "target_modules": ["k_proj"], "use_rslora": True},
    ]
    return base, [save_lora(tmp_path / f"lora-{i}", base, i, **k) for i, k in enumerate(keys)]


def _logits(model: torch.nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


def test_switching_in_peft_and_in_llama_cpp(
    pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]
) -> None:
    """Each packaged adapter gives the logits of the one that it was made from."""
    base, (first, second) = family
    ran = pack("adapters", base, first, f"other={second}", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    places = {"lora-0": first, "other": second}
    switched = PeftModel.from_pretrained(
        load_base(base), tmp_path / "out" / "adapters" / "lora-0", adapter_name="lora-0"
    )
    switched.load_adapter(tmp_path / "out" / "adapters" / "other", adapter_name="other")
    llama_cpp.write_gguf(base, tmp_path / "base.gguf")
    for name, adapter in places.items():
        expected = _logits(PeftModel.from_pretrained(load_base(base), adapter))
        switched.set_adapter(name)
        assert np.array_equal(_logits(switched), expected)
        gguf = tmp_path / "out" / "gguf" / f"{name}.gguf"
        found = llama_cpp.logits(tmp_path / "base.gguf", TOKENS, [(gguf, 1.0)])
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_serving_files(pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]) -> None:
    """Scripts that a shell accepts, naming every adapter; the largest rank that vLLM allows."""
    base, (first, second) = family
    ran = pack("adapters", f"{base}+{first}", f"{base}+{second}", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    vllm = (tmp_path / "out" / "serving" / "vllm.sh").read_text()
    assert "--max-lora-rank 32" in vllm
    assert 'lora-0="$here/adapters/lora-0" lora-1="$here/adapters/lora-1"' in vllm
    server = (tmp_path / "out" / "serving" / "llama-server.sh").read_text()
    assert server.count("--lora ") == 2
    for script in (tmp_path / "out" / "serving").iterdir():
        subprocess.run(["sh", "-n", script], check=True)
        assert script.stat().st_mode & 0o111
    config = json.loads(
        (tmp_path / "out" / "adapters" / "lora-0" / "adapter_config.json").read_text()
    )
    assert config["base_model_name_or_path"] == "base"
    lock = json.loads((tmp_path / "out" / "pack.lock").read_text())
    assert {o["path"] for o in lock["outputs"]} == set(digests(tmp_path / "out")) - {"pack.lock"}
    assert str(tmp_path) not in json.dumps(lock["outputs"])


def test_what_only_peft_can_use(pack: Callable, tmp_path: Path) -> None:
    """DoRA, patterns and other types are packaged, and it is said who cannot load them."""
    base = save_base(tmp_path / "base", "llama", **SIZES)
    dora = save_lora(tmp_path / "dora", base, target_modules=["q_proj"], use_dora=True)
    pattern = save_lora(
        tmp_path / "pattern", base, target_modules=["q_proj", "k_proj"],
        alpha_pattern={"q_proj": 3},
    )  # fmt: skip
    for name, config in {
        "loha": LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }.items():
        model = get_peft_model(load_base(base), config)
        model.peft_config["default"].base_model_name_or_path = str(base)
        randomise(model)
        model.save_pretrained(tmp_path / name)
    names = ["loha", "prefix"]
    ran = pack("adapters", base, dora, pattern, *(tmp_path / n for n in names), "-o",
               tmp_path / "out", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)["adapters"]
    assert "DoRA" in said["dora"]["no_gguf"]
    assert "DoRA" in said["dora"]["no_vllm"]
    assert said["pattern"]["no_gguf"] is None
    assert "one scale" in said["pattern"]["no_vllm"]
    assert "LOHA" in said["loha"]["no_gguf"]
    assert "PREFIX_TUNING" in said["prefix"]["no_vllm"]
    assert {p.name for p in (tmp_path / "out" / "gguf").iterdir()} == {"pattern.gguf"}
    assert not (tmp_path / "out" / "serving" / "vllm.sh").exists()
    for name in ("dora", "pattern", *names):
        source = tmp_path / name
        expected = _logits(PeftModel.from_pretrained(load_base(base), source))
        packaged = tmp_path / "out" / "adapters" / name
        assert np.array_equal(
            _logits(PeftModel.from_pretrained(load_base(base), packaged)), expected
        )


def test_a_recipe(pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]) -> None:
    base, loras = family
    recipe = tmp_path / "bundle.yaml"
    recipe.write_text(
        f"output: adapters\nbase_model: {base}\nmodels:\n"
        + "".join(f"- model: {lora}\n" for lora in loras)
    )
    ran = pack("adapters", recipe, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert (tmp_path / "dist" / "bundle" / "adapters" / "adapters" / "lora-1").is_dir()
    again = pack("adapters", recipe, "-o", tmp_path / "again")
    assert again.code == 0
    assert digests(tmp_path / "again") == digests(tmp_path / "dist" / "bundle" / "adapters")
    ran = pack("inspect", recipe)
    assert ran.code == 0, ran.err
    assert f"Run it: pack adapters {recipe}" in ran.out
    assert "cannot be opened" not in ran.out
    ran = pack("plan", recipe)
    assert ran.code == 1
    assert "pack inspect" in ran.err
    ran = pack("merge", "passthrough", recipe)
    assert ran.code == 2
    assert "pack adapters" in ran.err


def test_mistakes(pack: Callable, tmp_path: Path, family: tuple[Path, list[Path]]) -> None:
    base, (first, second) = family
    other = save_base(tmp_path / "other", "llama", **{**SIZES, "hidden_size": 32})
    out = tmp_path / "out"
    for words, message in (
        ((base, first, first), "two adapters are named 'lora-0'"),
        ((base, f"a/b={first}"), "no name for an adapter"),
        ((other, first), "was trained on"),
        ((other, f"!{first}"), "[96, 32]"),
        ((base, tmp_path / "nothing"), "no such file"),
        ((base, base), "adapter_config.json"),
        ((first, second), "is an adapter, not a whole model"),
    ):
        ran = pack("adapters", *words, "-o", out)
        assert ran.code == 1, words
        assert message in ran.err
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))
    assert pack("adapters", base, "-o", out).code == 2
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    ran = pack("adapters", base, first, "-o", out, "--force")
    assert ran.code == 1
    assert (out / "mine.txt").read_text() == "keep"
