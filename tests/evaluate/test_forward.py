"""The layer-by-layer forward pass: logits as of the whole model, for many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_lite.checkpoint.locate import open_checkpoint
from mergekit_lite.cli.progress import make_progress
from mergekit_lite.errors import PackError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mergekit_lite.evaluate.forward import LayerwiseModel  # noqa: E402

SILENT = make_progress(True)
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "head_dim": 8, **MOE}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {}),
    "olmo2": ("Olmo2", {}),
    "mistral, sliding window": ("Mistral", {"sliding_window": 8}),
    "deepseek_v3": ("DeepseekV3", {
        "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4, **MOE,
    }),
}  # fmt: skip
NAMES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def tiny(folder: Path, family: str, seed: int = 0) -> Any:
    """A random model of a family, saved; returns it as transformers has it."""
    name, more = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **more})
    model = getattr(transformers, NAMES.get(name, f"{name}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that none is left out
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def batches(vocabulary: int = 96) -> list[Any]:
    """Two batches of different sizes, longer than the sliding windows."""
    made = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, shape, generator=made) for shape in ((3, 24), (2, 17))]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = tiny(tmp_path, family)
    source = open_checkpoint(str(tmp_path), Path())
    model = LayerwiseModel(source.checkpoint)
    texts = batches()
    kept = model.hidden(texts, SILENT)
    for batch, found in zip(texts, model.logits(texts, kept), strict=True):
        with torch.no_grad():
            expected = whole(batch).logits
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    kept.close()
    assert all(parameter.is_meta for parameter in model.model.parameters())
    source.checkpoint.close()


def test_a_budget(tmp_path: Path) -> None:
    """Hidden states in a file are the same."""
    tiny(tmp_path, "llama")
    source = open_checkpoint(str(tmp_path), Path())
    texts = batches()
    found = []
    for budget in (1 << 30, 0):
        model = LayerwiseModel(source.checkpoint, budget=budget)
        found.append(list(model.logits(texts, model.hidden(texts, SILENT))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16(tmp_path: Path) -> None:
    """As the whole model in bfloat16."""
    tiny(tmp_path, "llama")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    source = open_checkpoint(str(tmp_path), Path())
    model = LayerwiseModel(source.checkpoint, "bfloat16")
    texts = batches()
    for batch, found in zip(texts, model.logits(texts, model.hidden(texts, SILENT)), strict=True):
        with torch.no_grad():
            assert torch.equal(found, whole(batch).logits.float())


def test_what_is_broken(tmp_path: Path) -> None:
    """NaN names the layer; a tensor that lacks or does not fit is named."""
    from safetensors.numpy import load_file, save_file

    tiny(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.2.mlp.up_proj.weight"

    def run() -> None:
        source = open_checkpoint(str(tmp_path), Path())
        LayerwiseModel(source.checkpoint).hidden(batches(), SILENT)

    save_file({**whole, name: np.full_like(whole[name], np.nan)}, path, {"format": "pt"})
    with pytest.raises(PackError, match="layer 2 gives NaN"):
        run()
    save_file({**whole, name: whole[name][:-1].copy()}, path, {"format": "pt"})
    with pytest.raises(
        PackError, match=r"is \[47, 32\], the model of its config.json has \[48, 32\]"
    ):
        run()
    save_file({k: v for k, v in whole.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(PackError, match=f"has no tensor for '{name}'"):
        run()
