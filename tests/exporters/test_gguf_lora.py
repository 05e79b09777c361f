"""Adapters as GGUF in llama.cpp: the logits of PEFT beside the base, and of the merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from exporters.gguf.lora import write_gguf_lora
from mergekit_lite.adapters.config import read_adapter_config
from mergekit_lite.adapters.locate import open_adapter
from mergekit_lite.errors import PackError
from tests import llama_cpp
from tests.adapters.models import load_base, save_base, save_lora

TOKENS = [3, 17, 60, 2, 41, 5, 5, 79, 33, 12, 70, 8]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": LINEAR},
    "scales": {
        "r": 4, "lora_alpha": 12, "target_modules": LINEAR, "use_rslora": True,
        "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 3},
    },
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}  # fmt: skip


def _gguf(base: Path, adapter: Path, out: Path) -> None:
    source = open_adapter(str(adapter), Path())
    config = read_adapter_config(adapter, str(adapter))
    write_gguf_lora(config, source.checkpoint, load_base(base).config.to_dict(), out, "test")


@pytest.mark.parametrize("case", CASES)
def test_logits_beside_the_base(pack: Callable, tmp_path: Path, case: str) -> None:
    """llama.cpp with --lora, PEFT at run time, and the merged model agree within 1e-5."""
    base = save_base(tmp_path / "base", "llama", **SIZES)
    adapter = save_lora(tmp_path / "adapter", base, **CASES[case])
    with torch.no_grad():
        model = PeftModel.from_pretrained(load_base(base), adapter).eval()
        beside = model(torch.tensor([TOKENS])).logits[0].numpy()
        plain = load_base(base)(torch.tensor([TOKENS])).logits[0].numpy()
    llama_cpp.write_gguf(base, tmp_path / "base.gguf")
    _gguf(base, adapter, tmp_path / "adapter.gguf")
    largest = np.abs(beside).max()
    found = llama_cpp.logits(tmp_path / "base.gguf", TOKENS)
    assert np.abs(found - plain).max() < 1e-5 * largest
    found = llama_cpp.logits(tmp_path / "base.gguf", TOKENS, [(tmp_path / "adapter.gguf", 1.0)])
    assert np.abs(found - beside).max() < 1e-5 * largest
    assert np.abs(plain - beside).max() > 1e-2 * largest
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", tmp_path / "merged", "-q")
    assert ran.code == 0, ran.err
    llama_cpp.write_gguf(tmp_path / "merged", tmp_path / "merged.gguf")
    found = llama_cpp.logits(tmp_path / "merged.gguf", TOKENS)
    assert np.abs(found - beside).max() < 1e-5 * largest


def test_same_bytes_twice(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", **SIZES)
    adapter = save_lora(tmp_path / "adapter", base, **CASES["scales"])
    for name in ("a.gguf", "b.gguf"):
        _gguf(base, adapter, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "saved whole"),
        ({"trainable_token_indices": [1]}, "rows of embeddings"),
    ],
)
def test_what_gguf_cannot_carry(tmp_path: Path, keys: dict[str, Any], word: str) -> None:
    base = save_base(tmp_path / "base", "llama", **SIZES)
    adapter = save_lora(tmp_path / "adapter", base, target_modules=["q_proj"], **keys)
    with pytest.raises(PackError, match=word) as caught:
        _gguf(base, adapter, tmp_path / "adapter.gguf")
    assert "pack extract" in caught.value.hint
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_unknown_family(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "vit")
    adapter = save_lora(tmp_path / "adapter", base, target_modules=["query", "q_proj"])
    with pytest.raises(PackError, match="'vit'"):
        _gguf(base, adapter, tmp_path / "adapter.gguf")
