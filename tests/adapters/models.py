"""Tiny random models and adapters, made by transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 80,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 64,
}  # fmt: skip


def llama(**keys: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **keys}))


def gpt2(**keys: Any) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=80, n_positions=64, **keys)
    )


def mixtral(**keys: Any) -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(**{**SIZES, "num_local_experts": 4, "tie_word_embeddings": False, **keys})
    )


def vit(**keys: Any) -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
            image_size=16, patch_size=4, num_labels=3, **keys,
        )
    )  # fmt: skip


FAMILIES: Mapping[str, Callable[..., PreTrainedModel]] = {
    "llama": llama, "gpt2": gpt2, "mixtral": mixtral, "vit": vit,
}  # fmt: skip


def save_base(folder: Path, family: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    """Make a random model whose norms and biases are not trivial, and save it."""
    torch.manual_seed(0)
    model = FAMILIES[family](**keys)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


def load_base(folder: Path) -> PreTrainedModel:
    config = json.loads((folder / "config.json").read_text())
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def randomise(model: nn.Module, scale: float = 0.1, seed: int = 1) -> None:
    """Add noise to everything that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * scale)


def save_lora(folder: Path, base: Path, seed: int = 1, **keys: Any) -> Path:
    """Put a random LoRA on a base and save it as PEFT does; `keys` are those of `LoraConfig`."""
    torch.manual_seed(seed)
    model = get_peft_model(load_base(base), LoraConfig(**keys))
    model.peft_config["default"].base_model_name_or_path = str(base)
    randomise(model, seed=seed)
    model.save_pretrained(folder)
    return folder


def peft_merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merge_and_unload gives, under the names that it is saved with."""
    merged = PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload()
    merged.save_pretrained(out)
    return tensors_of(out)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model, as float32."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return found


def worst(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert set(ours) == set(theirs)
    assert all(torch.isfinite(tensor).all() for tensor in (*ours.values(), *theirs.values()))
    found = {
        name: float((ours[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30))
        for name, tensor in theirs.items()
    }
    name = max(found, key=lambda n: found[n])
    print(f"worst: {name} {found[name]:.1e}")
    return found[name]
