"""Every form of LoRA that pack merges itself, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig

from tests.adapters.models import (
    load_base,
    peft_merged,
    save_base,
    save_lora,
    tensors_of,
    worst,
)

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"r": 4, "target_modules": ALL_LINEAR}),
    "rank 1": ("llama", {}, {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj"]}),
    "all-linear": ("llama", {}, {"target_modules": "all-linear"}),
    "regex": ("llama", {}, {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\..*_proj)"}),
    "patterns": ("llama", {}, {
        "r": 4, "target_modules": ALL_LINEAR,
        "rank_pattern": {
            "q_proj": 7, r"layers\.1\.mlp\.up_proj": 3, "^model.layers.0.mlp.up_proj": 5,
        },
        "alpha_pattern": {"k_proj": 32, r"layers.2.self_attn.q_proj": 1},
    }),
    "rslora": ("llama", {}, {"r": 9, "use_rslora": True, "target_modules": ALL_LINEAR}),
    "dora": ("llama", {}, {"r": 4, "use_dora": True, "target_modules": ALL_LINEAR}),
    "dora rslora": ("llama", {}, {
        "r": 4, "use_dora": True, "use_rslora": True, "target_modules": ALL_LINEAR,
        "rank_pattern": {"v_proj": 2},
    }),
    "embeddings": ("llama", {}, {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora embeddings": ("llama", {}, {
        "r": 4, "use_dora": True, "target_modules": ["embed_tokens", "lm_head"],
    }),
    "modules_to_save": ("llama", {}, {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"],
    }),
    "embeddings saved": ("llama", {}, {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"],
    }),
    "tokens": ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 70, 1]}),
    "tokens by module": ("llama", {}, {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [9]},
    }),
    "layers_to_transform": ("llama", {}, {
        "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
    }),
    "bias all": ("llama", {"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("llama", {"attention_bias": True}, {
        "target_modules": ["q_proj", "o_proj"], "bias": "lora_only",
    }),
    "lora_bias": ("llama", {"attention_bias": True}, {
        "target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True,
    }),
    "gaussian": ("llama", {}, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {}, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "eva": ("llama", {}, {"target_modules": ["q_proj"], "init_lora_weights": "eva"}),
    "mica": ("llama", {}, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "pissa": ("llama", {}, {"r": 4, "target_modules": ALL_LINEAR, "init_lora_weights": "pissa"}),
    "olora": ("llama", {}, {"r": 4, "target_modules": ALL_LINEAR, "init_lora_weights": "olora"}),
    "bdlora": ("llama", {}, {
        "r": 4, "target_modules": ["q_proj", "o_proj"], "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2,
        ),
    }),
    "monteclora": ("llama", {}, {
        "r": 4, "target_modules": ["q_proj"], "monteclora_config": MontecloraConfig(),
    }),
    "velora": ("llama", {}, {
        "r": 4, "target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=8),
    }),
    "conv1d": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d square": ("gpt2", {}, {"target_modules": r".*attn\.c_proj"}),
    "conv1d dora": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d pissa": ("gpt2", {}, {"target_modules": ["c_attn"], "init_lora_weights": "pissa"}),
    "conv1d lora_bias": ("gpt2", {}, {"target_modules": ["c_attn"], "lora_bias": True}),
    "gpt2 bias": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "all"}),
    "convolution": ("vit", {}, {
        "target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"],
    }),
    "convolution dora": ("vit", {}, {"target_modules": ["projection"], "use_dora": True}),
    "experts attention": ("mixtral", {}, {"target_modules": ["q_proj", "o_proj"]}),
    "experts": ("mixtral", {}, {
        "r": 3, "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }),
    "experts down": ("mixtral", {}, {
        "r": 2, "lora_alpha": 5, "target_modules": [],
        "target_parameters": ["experts.down_proj"], "use_rslora": True,
    }),
    "router": ("mixtral", {}, {
        "r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"],
    }),
}  # fmt: skip


def _merge(pack: Callable, base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", out, "--dtype", "float32", "-q")
    assert ran.code == 0, ran.err
    return tensors_of(out)


@pytest.mark.parametrize("case", CASES)
def test_merging_is_that_of_peft(
    pack: Callable, tmp_path: Path, case: str, record_property: Callable
) -> None:
    """Largest difference at most 1e-5 of each tensor's largest value, in float32."""
    family, model, keys = CASES[case]
    base = save_base(tmp_path / "base", family, **model)
    adapter = save_lora(tmp_path / "adapter", base, **keys)
    theirs = peft_merged(base, adapter, tmp_path / "theirs")
    ours = _merge(pack, base, adapter, tmp_path / "ours")
    error = worst(ours, theirs)
    record_property("peft", f"LORA {case}\t{family}\tmerged (streamed)\t{error:.1e}")
    assert error <= 1e-5
    changed = tensors_of(base)
    assert any(n not in changed or not torch.equal(t, changed[n]) for n, t in ours.items())


TIED = {
    "input": {"target_modules": ["embed_tokens"]},
    "output": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "input saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "output saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 70, 1]},
}


REPLICATED = {
    "once": {"target_modules": ["q_proj", "up_proj"], "layer_replication": [[0, 2], [1, 3]]},
    "dora": {"target_modules": ["k_proj"], "layer_replication": [[0, 3], [0, 3]], "use_dora": True},
}


@pytest.mark.parametrize("case", [*TIED, *REPLICATED])
def test_what_peft_shares_gives_the_logits_of_the_adapter_beside_its_base(
    pack: Callable, tmp_path: Path, case: str
) -> None:
    """Tied embeddings and replicated layers share weights, so that PEFT, merging in place, changes
    them for all who share them; the adapter beside its base does not, and neither does pack."""
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=case in TIED)
    adapter = save_lora(tmp_path / "adapter", base, **(TIED | REPLICATED)[case])
    tokens = torch.arange(1, 75).reshape(2, 37)
    beside = PeftModel.from_pretrained(load_base(base), adapter).eval()
    with torch.no_grad():
        expected = beside(tokens).logits
    _merge(pack, base, adapter, tmp_path / "ours")
    with torch.no_grad():
        found = load_base(tmp_path / "ours")(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
