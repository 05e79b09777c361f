"""pack inspect, against transformers, PEFT and the files themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.adapters.models import load_base, save_base, save_lora
from tests.conftest import write_model, write_recipe


def _seen(pack: Callable, path: object, *words: object) -> dict:
    ran = pack("inspect", path, "--json", *words)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "vit"])
def test_a_model(pack: Callable, tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", family, torch.bfloat16)
    model = load_base(base)
    seen = _seen(pack, base, "--tensors")
    assert seen["architecture"] == type(model).__name__
    parameters = {id(p): p.numel() for p in model.parameters()}
    assert seen["parameters"] == sum(parameters.values())
    assert seen["layers"] == model.config.num_hidden_layers
    assert seen["dtypes"] == {
        "BF16": {"elements": seen["parameters"], "bytes": 2 * seen["parameters"]}
    }
    assert sum(t["bytes"] for t in seen["tensor_list"]) == seen["size"]
    assert seen["files"] == ["model.safetensors"]
    assert seen["tokenizer"] is None
    if family == "llama":
        assert seen["dimensions"]["key-value heads"] == 2


def test_card_licence_and_tokenizer(pack: Callable, example_models: Path, tmp_path: Path) -> None:
    seen = _seen(pack, example_models / "base")
    assert seen["tokenizer"] == "BPE, 2048 tokens"
    assert seen["chat_template"] is True
    folder = write_model(tmp_path / "m", {"x": torch.ones(2)})
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nbase_model: [a/b, c/d]\n---\ntext"
    )
    seen = _seen(pack, folder)
    assert seen["licence"] == "llama3"
    assert seen["base"] == ["a/b", "c/d"]


def test_an_adapter(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(
        tmp_path / "lora", base, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 16}, use_rslora=True, modules_to_save=["lm_head"],
    )  # fmt: skip
    seen = _seen(pack, adapter)
    assert (seen["kind"], seen["merges"]) == ("LORA", "streamed")
    assert seen["base"] == str(base)
    assert [(g["kind"], g["modules"], g["rank"]) for g in seen["ranks"]] == [
        ("q_proj", 3, 4), ("up_proj", 3, 16),
    ]  # fmt: skip
    assert seen["ranks"][0]["scale"] == 8 / 4**0.5
    assert seen["options"] == {"use_rslora": True, "modules_to_save": ["lm_head"]}
    assert seen["whole"] == ["lm_head.weight"]
    together = _seen(pack, f"{base}+{adapter}")
    assert together["parameters"] == _seen(pack, base)["parameters"]


def test_a_recipe(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {"base": {"density": 0.5}, "gone": {}}, base_model=str(base)
    )
    ran = pack("inspect", recipe)
    assert ran.code == 0, ran.err
    assert "LlamaForCausalLM" in ran.out
    assert "gone: cannot be opened" in ran.out


def test_what_cannot_be_inspected(pack: Callable, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    ran = pack("inspect", tmp_path / "m.gguf")
    assert ran.code == 1
    assert "GGUF" in ran.err
    ran = pack("inspect", tmp_path / "nothing")
    assert ran.code == 1
    assert "no such file" in ran.err


def test_names_cannot_move_the_cursor(pack: Callable, tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "m", {"a\x1b[2Jb": torch.ones(2)}, {"architectures": ["X\x1b]0;title\x07"]}
    )
    ran = pack("inspect", folder, "--tensors")
    assert ran.code == 0, ran.err
    assert "\x1b" not in ran.out
    assert "\x07" not in ran.out
