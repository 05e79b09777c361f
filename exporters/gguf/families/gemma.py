"""Gemma 1, 2 and 3 (text), whose norms multiply by one more than their weights."""

from __future__ import annotations

from exporters.gguf.families.base import Family, Hyperparameters, Settings, common, rope
from exporters.gguf.metadata import f32, u32
from mergekit_lite.errors import PackError

__all__ = ["GEMMA", "GEMMA2", "GEMMA3"]


def _gemma(settings: Settings) -> Hyperparameters:
    for key in ("hidden_activation", "hidden_act"):
        settings.expect(key, "gelu_pytorch_tanh", "gelu")
    width = u32(settings.whole("head_dim", default=256))
    return {
        **common(settings),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": f32(settings.number("rms_norm_eps", default=1e-6)),
        **rope(settings),
    }


def _scaled_by_width(settings: Settings) -> None:
    """llama.cpp divides scores by the root of the head's width, but in the largest models."""
    scalar = settings.number("query_pre_attn_scalar", default=256)
    large = settings.whole("num_hidden_layers") in (46, 62)
    expected = settings.whole("hidden_size") / settings.heads if large else settings.width
    if scalar != expected:
        raise PackError(
            f"{settings.label}: config.json gives 'query_pre_attn_scalar' as {scalar:g}; "
            f"llama.cpp computes {expected:g} for a model of this shape"
        )


def _gemma2(settings: Settings) -> Hyperparameters:
    _scaled_by_width(settings)
    _pattern(settings, 2)
    return _gemma(settings) | {
        "attn_logit_softcapping": f32(settings.number("attn_logit_softcapping")),
        "final_logit_softcapping": f32(settings.number("final_logit_softcapping")),
        "attention.sliding_window": u32(settings.whole("sliding_window", default=4096)),
    }


def _gemma3(settings: Settings) -> Hyperparameters:
    _scaled_by_width(settings)
    _pattern(settings, 6)
    settings.expect("attn_logit_softcapping")
    values = _gemma(settings)
    local = settings.rope("sliding_attention")
    base = settings.get("rope_local_base_freq", local["rope_theta"])
    values["rope.freq_base_swa"] = f32(float(base))
    values["attention.sliding_window"] = u32(settings.whole("sliding_window", default=4096))
    if settings.get("final_logit_softcapping") is not None:
        values["final_logit_softcapping"] = f32(settings.number("final_logit_softcapping"))
    return values


def _pattern(settings: Settings, period: int) -> None:
    """Every so many layers, one attends to the whole text."""
    layers = settings.whole("num_hidden_layers")
    expected = [
        "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)
    ]
    if settings.get("layer_types", expected) != expected:
        raise PackError(
            f"{settings.label}: config.json gives other 'layer_types' than full attention in every "
            f"layer that is a multiple of {period}; llama.cpp computes those only"
        )


GEMMA = Family("gemma", _gemma, tied=True, shifted=("norm.weight",))
GEMMA2 = Family("gemma2", _gemma2, tied=True, shifted=("norm.weight",))
GEMMA3 = Family("gemma3", _gemma3, tied=True, shifted=("norm.weight",), nested=True)
