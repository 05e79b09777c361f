"""Every family of models as float32 GGUF: llama.cpp gives the logits of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from exporters.gguf.families import FAMILIES
from tests import llama_cpp

TOKENS = [int(n) for n in np.random.default_rng(0).integers(0, 80, 64)]
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 80,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [2.0] * 8,
}  # fmt: skip
NEOX = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
FALCON = {"alibi": False, "bias": False, "parallel_attn": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", {}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 16}),
    "gemma3_text": ("Gemma3Text", {**GEMMA, "sliding_window": 16, "num_hidden_layers": 7}),
    "falcon": ("Falcon", {**FALCON, "multi_query": True}),
    "falcon, groups": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox": ("GPTNeoX", {**UNTIED, "rope_parameters": NEOX}),
    "gpt_neox, one after the other": ("GPTNeoX", {**UNTIED, "use_parallel_residual": False,
                                                  "rope_parameters": NEOX}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.2,
                            "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "llama": ("Llama", UNTIED),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {**UNTIED, "head_dim": 32}),
    "llama, biases": ("Llama", {**UNTIED, "attention_bias": True, "mlp_bias": True}),
    "llama, no GQA": ("Llama", {**UNTIED, "num_key_value_heads": 4}),
    "llama, linear": ("Llama", {**UNTIED, "rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama, llama3": ("Llama", {**UNTIED, "rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", {**UNTIED, "rope_parameters": YARN}),
    "llama, yarn factor": ("Llama", {**UNTIED, "rope_parameters": {
        **YARN, "attention_factor": 1.3}}),
    "mistral": ("Mistral", UNTIED),
    "mixtral": ("Mixtral", {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", UNTIED),
    "phi3": ("Phi3", UNTIED),
    "phi3, longrope": ("Phi3", {**UNTIED, "rope_parameters": LONG}),
    "qwen2": ("Qwen2", UNTIED),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", {**UNTIED, **EXPERTS, "shared_expert_intermediate_size": 128}),
    "qwen3": ("Qwen3", {**UNTIED, "head_dim": 32}),
    "qwen3_moe": ("Qwen3Moe", {**UNTIED, **EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "stablelm": ("StableLm", {**UNTIED, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2", {}),
}  # fmt: skip


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"num_key_value_heads": 4}),
    "nomic_bert": ("NomicBert", {"num_key_value_heads": 4}),
}


def save_model(folder: Path, kind: str, **keys: Any) -> Path:
    """A random model whose norms, biases and heads all matter."""
    torch.manual_seed(0)
    sizes = {} if kind == "GPT2" else SIZES
    special = {k: SIZES[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    every = {**sizes, **special, **keys}
    config = getattr(transformers, f"{kind}Config")(**every)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def test_every_family_has_a_case() -> None:
    named = {name.partition(",")[0] for name in (*CASES, *ENCODERS)}
    assert named == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, case: str, record_property: Callable[[str, str], None]) -> None:
    """On 64 tokens, within 1e-3 of the largest logit; then the same 16 likeliest tokens."""
    kind, keys = CASES[case]
    folder = save_model(tmp_path / "model", kind, **keys)
    llama_cpp.write_gguf(folder, tmp_path / "model.gguf")
    found, ours = llama_cpp.greedy(tmp_path / "model.gguf", TOKENS)
    expected, theirs = _of_transformers(folder)
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    record_property("families", f"{case}\t{worst:.1e}\t{same} of 16")
    assert worst < 1e-3
    assert ours == theirs


def _of_transformers(folder: Path) -> tuple[Any, list[int]]:
    """Logits of the prompt, and the 16 likeliest tokens that follow."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = list(TOKENS)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
        for _ in range(16):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return logits, tokens[len(TOKENS) :]


@pytest.mark.parametrize("case", ENCODERS)
def test_hidden_states(
    tmp_path: Path, case: str, record_property: Callable[[str, str], None]
) -> None:
    """Of every one of 64 tokens, within 1e-3 of the largest."""
    kind, keys = ENCODERS[case]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**{**SIZES, **keys})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = model(torch.tensor([TOKENS])).last_hidden_state[0].numpy()
    model.save_pretrained(tmp_path / "model")
    llama_cpp.write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    found = llama_cpp.embeddings(tmp_path / "model.gguf", TOKENS)
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    record_property("families", f"{case}\t{worst:.1e}\thidden states")
    assert worst < 1e-3
