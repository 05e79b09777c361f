"""Models of many architectures, none of which is named in our code: names come from the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import ROOT, load, write_recipe

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}

MODELS: dict[str, Callable[[], Any]] = {
    "tied llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, **HEADS, intermediate_size=64, tie_word_embeddings=True)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SMALL, **HEADS, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SMALL, **HEADS, intermediate_size=64)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SMALL, **HEADS, intermediate_size=64, head_dim=8)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, num_attention_heads=4, intermediate_size=64, num_labels=3)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=96)
    ),
}


def _make(tmp_path: Path, name: str) -> Any:
    """Save a base and two fine-tunes; returns the base."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "base")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for number, tuned in enumerate("ab", 1):
        torch.manual_seed(number)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n] + torch.randn_like(p) * 0.01)
        model.save_pretrained(tmp_path / tuned)
    return type(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_loads_and_is_the_mean(pack: Callable, tmp_path: Path, name: str) -> None:
    """Task arithmetic with halves is the mean of the fine-tunes; transformers loads it whole."""
    kind = _make(tmp_path, name)
    recipe = write_recipe(
        tmp_path / "r.yaml", "task_arithmetic", {n: {"weight": 0.5} for n in "ab"},
        base_model="base", dtype="float32",
    )  # fmt: skip
    ran = pack("merge", recipe, "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    first, second, merged = (load(tmp_path / n) for n in ("a", "b", "out"))
    assert merged.keys() == first.keys()
    for tensor, value in merged.items():
        np.testing.assert_allclose(value, (first[tensor] + second[tensor]) / 2, atol=1e-6)
    loaded, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert sum(p.numel() for p in loaded.parameters()) > 0


def test_integer_buffers_are_copied(pack: Callable, tmp_path: Path) -> None:
    from tests.conftest import write_model

    for name, number in (("base", 1), ("a", 1), ("b", 1)):
        write_model(
            tmp_path / name,
            {"layers.0.w": torch.full((4, 4), float(number)), "layers.0.ids": torch.arange(5),
             "layers.0.mask": torch.tensor([True, False])},
            {"num_hidden_layers": 1},
        )  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["layers.0.ids"], torch.arange(5))
    assert merged["layers.0.mask"].dtype == torch.bool


def test_an_untied_head_is_merged_with_a_tied_one(pack: Callable, tmp_path: Path) -> None:
    """A head that only one model carries is merged with the other's embedding, and untied."""
    torch.manual_seed(0)
    settings = {**SMALL, **HEADS, "intermediate_size": 64}
    tied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, tie_word_embeddings=True)
    )
    tied.save_pretrained(tmp_path / "tied")
    untied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, tie_word_embeddings=False)
    )
    untied.save_pretrained(tmp_path / "untied")
    recipe = write_recipe(
        tmp_path / "r.yaml", "slerp", {"untied": {}}, base_model="tied", parameters={"t": 1.0}
    )
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "'lm_head.weight' is tied to the input embedding in tied" in ran.err
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.lm_head.weight, untied.lm_head.weight)
    assert torch.equal(merged.model.embed_tokens.weight, untied.model.embed_tokens.weight)


def test_no_architecture_is_named_in_our_code() -> None:
    words = ("llama", "mixtral", "qwen", "gemma", "gpt2", "bert", "mistral", "phi3")
    for path in (ROOT / "mergekit_lite").rglob("*.py"):
        text = path.read_text().lower()
        for program in (
            "llama.cpp",
            "llama-cpp",
            "llama-server",
            "llama-imatrix",
            "llama-quantize",
            "xllamacpp",
        ):
            text = text.replace(program, "")
        assert not [word for word in words if word in text], path
