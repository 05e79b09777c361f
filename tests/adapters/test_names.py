"""Where parameters lie in files, against the values that transformers loads from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.checkpoint.safetensors import SafetensorsCheckpoint
from tests.adapters.models import tensors_of

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "intermediate_size": 24,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
_MANY = {"num_experts": 11, "shared_expert_intermediate_size": 12, **_EXPERTS}
_LATENT = {"n_routed_experts": 12, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
           "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
           "n_shared_experts": 1, "first_k_dense_replace": 1, **_EXPERTS}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40},
    "deepseek_v3": {**_SIZES, **_LATENT},
    "flex_olmo": {**_SIZES, **_MANY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma3_text": _SIZES,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16},
    "gpt_neox": {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
    "gpt_oss": {**_SIZES, "num_local_experts": 11, "num_experts_per_tok": 2},
    "granitemoe": {**_SIZES, "num_local_experts": 11, "num_experts_per_tok": 2},
    "minimax": {**_SIZES, "num_local_experts": 11, "num_experts_per_tok": 2},
    "mixtral": {**_SIZES, "num_local_experts": 11, "num_experts_per_tok": 2},
    "phi3": {**_SIZES, "pad_token_id": 0},
    "phimoe": {**_SIZES, "num_local_experts": 11, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SIZES, **_MANY},
    "qwen3_moe": {**_SIZES, **_MANY},
    "recurrent_gemma": {**_SIZES, "num_key_value_heads": 1, "lru_width": 16},
}
STACKED = {"deepseek_v3", "flex_olmo", "minimax", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe"}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_found_and_has_the_values_that_transformers_loads(
    tmp_path: Path, kind: str, bare: bool
) -> None:
    """Saved whole, or from the bare model, which lacks a prefix; with more than ten experts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[kind](**MODELS[kind]), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.config.architectures = [type(model).__name__]
    (model.base_model if bare else model).save_pretrained(tmp_path)
    if bare:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    stored = {name: tensor.numpy() for name, tensor in tensors_of(tmp_path).items()}
    names = ModelNames(SafetensorsCheckpoint(tmp_path))
    stacks = 0
    head = {"lm_head.weight", "embed_out.weight", *loaded.all_tied_weights_keys}
    for name, parameter in loaded.named_parameters():
        values = parameter.detach().numpy()
        places = names.find(name)
        assert places or (bare and name in head), name
        stacks += len(places) > 1
        for place in places:
            part = values if place.expert is None else values[place.expert]
            part = part if place.rows is None else part[slice(*place.rows)]
            np.testing.assert_array_equal(stored[place.tensor], part, err_msg=name)
        covered = sum(stored[place.tensor].size for place in places)
        assert covered in (0, values.size)
    assert (stacks > 0) == (kind in STACKED)
