"""Qwen2 and Qwen3, dense and with experts."""

from __future__ import annotations

from exporters.gguf.families.base import Family, Hyperparameters, Settings, common, experts, rope
from exporters.gguf.metadata import f32, u32

__all__ = ["QWEN2", "QWEN2_MOE", "QWEN3", "QWEN3_MOE"]


def _qwen2(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "silu")
    settings.expect("use_sliding_window", False)
    epsilon = settings.number("rms_norm_eps", default=1e-6)
    return common(settings) | {"attention.layer_norm_rms_epsilon": f32(epsilon)} | rope(settings)


def _qwen3(settings: Settings) -> Hyperparameters:
    width = u32(settings.whole("head_dim", default=128))
    return _qwen2(settings) | {"attention.key_length": width, "attention.value_length": width}


def _only_experts(settings: Settings) -> None:
    """llama.cpp has experts in every layer of these."""
    settings.expect("decoder_sparse_step", 1)
    settings.expect("mlp_only_layers", [])


def _qwen2_moe(settings: Settings) -> Hyperparameters:
    _only_experts(settings)
    settings.expect("norm_topk_prob", False)
    shared = settings.whole("shared_expert_intermediate_size")
    values = _qwen2(settings) | experts(settings)
    return values | {"expert_shared_feed_forward_length": u32(shared)}


def _qwen3_moe(settings: Settings) -> Hyperparameters:
    _only_experts(settings)
    settings.expect("norm_topk_prob", True)
    return _qwen3(settings) | experts(settings)


QWEN2 = Family("qwen2", _qwen2)
QWEN3 = Family("qwen3", _qwen3)
QWEN2_MOE = Family("qwen2moe", _qwen2_moe)
QWEN3_MOE = Family("qwen3moe", _qwen3_moe)
