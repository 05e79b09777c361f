"""Adapters that do not fit: one clear error, before any weight is read, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.models import save_base, save_lora

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def _edit_config(adapter: Path, **keys: Any) -> None:
    file = adapter / CONFIG
    config = json.loads(file.read_text())
    config.update(keys)
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))


def _edit_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")

BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing factor": (lambda a: _edit_weights(a, lambda t: t.__delitem__(B)),
                       ["layers.1.self_attn.q_proj", "no lora_B"]),
    "leftover": (lambda a: _edit_weights(a, lambda t: t.update(extra=torch.ones(3))),
                 ["1 tensor(s)", "extra"]),
    "unknown module": (
        lambda a: _edit_weights(
            a, lambda t: t.update({A.replace("q_proj", "z_proj"): t.pop(A),
                                   B.replace("q_proj", "z_proj"): t.pop(B)})
        ),
        ["2 tensor(s)", "z_proj"],
    ),
    "wrong rank": (lambda a: _edit_config(a, r=5), ["ranks 4 and 4", "gives 5"]),
    "wrong shape": (
        lambda a: _edit_weights(a, lambda t: t.update({A: torch.ones(4, 33)})),
        ["[32, 33]", "[32, 32]"],
    ),
    "unsharded": (lambda a: _edit_weights(a, lambda t: t.update({A: torch.ones(0)})),
                  ["no matrix", "DeepSpeed"]),
    "dora without lengths": (lambda a: _edit_config(a, use_dora=True), ["asks for DoRA"]),
    "no type": (lambda a: _edit_config(a, peft_type="REMOVE"), ["peft_type"]),
    "unknown type": (lambda a: _edit_config(a, peft_type="LORAX"), ["LORAX", "did you mean"]),
    "no json": (lambda a: (a / CONFIG).write_text("{") and None, ["not valid JSON"]),
    "alpha is text": (lambda a: _edit_config(a, lora_alpha="big"), ["lora_alpha", "a number"]),
    "rank is zero": (lambda a: _edit_config(a, r=0), ["'r'", "positive"]),
    "pattern": (lambda a: _edit_config(a, rank_pattern={"(": 3}), ["rank_pattern", "regular"]),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), ["holds adapter_config.json but no"]),
    "truncated": (
        lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-40]) and None,
        [WEIGHTS],
    ),
    "corda": (lambda a: _edit_config(a, init_lora_weights="corda"),
              ["CorDA", "path_initial_model_for_weight_conversion"]),
    "alora": (lambda a: _edit_config(a, alora_invocation_tokens=[1]), ["aLoRA"]),
    "other base": (lambda a: _edit_config(a, base_model_name_or_path=str(a)),
                   ["was trained on", "exclamation mark"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_one_clear_error(pack: Callable, tmp_path: Path, case: str) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(tmp_path / "adapter", base, r=4, target_modules=["q_proj", "up_proj"])
    breaks, words = BROKEN[case]
    breaks(adapter)
    # Were any weight read, this would be noticed: the data of the base is not there.
    file = base / "model.safetensors"
    size = file.stat().st_size
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    with file.open("r+b") as target:
        target.truncate(header)
        target.truncate(size)
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", tmp_path / "out")
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    assert "pack itself failed" not in ran.err
    for word in words:
        assert word in ran.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_another_vocabulary(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    larger = save_base(tmp_path / "larger", "llama", vocab_size=90)
    for keys in (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [85]},
    ):
        adapter = save_lora(tmp_path / "adapter", larger, **keys)
        ran = pack("merge", "adapter", f"{base}+!{adapter}", "-o", tmp_path / "out")
        assert ran.code == 1
        assert "vocabulary" in ran.err
        assert "90" in ran.err or "85" in ran.err
        assert not (tmp_path / "out").exists()


def test_a_base_by_force(pack: Callable, tmp_path: Path) -> None:
    """An exclamation mark puts an adapter on another base of the same shape."""
    base = save_base(tmp_path / "base", "llama")
    other = save_base(tmp_path / "other", "llama")
    adapter = save_lora(tmp_path / "adapter", base, target_modules=["q_proj"])
    ran = pack("merge", "adapter", f"{other}+{adapter}", "-o", tmp_path / "out")
    assert ran.code == 1
    assert f"+!{adapter}" in ran.err
    ran = pack("merge", "adapter", f"{other}+!{adapter}", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("reference", "word"),
    [
        ("{base}+", "after '+' comes an adapter"),
        ("{base}+0.5*", "after '+' comes an adapter"),
        ("{base}+nothing", "no such file"),
        ("+{adapter}", "no base before"),
        ("{base}+{base}", "adapter_config.json"),
        ("{adapter}+{adapter}", "is an adapter, not a whole model"),
        ("{base}+{adapter}+{adapter}x", "no such file"),
    ],
)
def test_references(pack: Callable, tmp_path: Path, reference: str, word: str) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(tmp_path / "adapter", base, target_modules=["q_proj"])
    written = reference.format(base=base, adapter=adapter)
    ran = pack("merge", "adapter", written, "-o", tmp_path / "out")
    assert ran.code == 1
    assert word in ran.err


def test_an_adapter_alone_names_its_base(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(tmp_path / "adapter", base, target_modules=["q_proj"])
    (tmp_path / "r.yaml").write_text(
        json.dumps({"merge_method": "passthrough", "models": [{"model": str(adapter)}]})
    )
    ran = pack("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert ran.code == 1
    assert f"{base}+{adapter}" in ran.err
    ran = pack("merge", "adapter", base, "-o", tmp_path / "out")
    assert ran.code == 2
    assert "BASE+ADAPTER" in ran.err
