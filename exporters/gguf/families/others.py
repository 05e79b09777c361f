"""Families with a few particulars each: Command R, OLMo 2, Phi-3, StableLM, StarCoder2."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, sqrt

import numpy as np

from exporters.gguf.families.base import Family, Hyperparameters, Settings, common, rope
from exporters.gguf.metadata import f32, flag, text, u32
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["COHERE", "OLMO2", "PHI3", "STABLELM", "STARCODER2"]


def _cohere(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "silu")
    settings.expect("use_qk_norm", False)
    return {
        **common(settings),
        "attention.layer_norm_epsilon": f32(settings.number("layer_norm_eps", default=1e-5)),
        "logit_scale": f32(settings.number("logit_scale", default=0.0625)),
        **rope(settings),
        "rope.scaling.type": text("none"),
    }


def _olmo2(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "silu")
    epsilon = settings.number("rms_norm_eps", default=1e-5)
    return common(settings) | {"attention.layer_norm_rms_epsilon": f32(epsilon)} | rope(settings)


def _stablelm(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "silu")
    settings.expect("qk_layernorm", False)
    return {
        **common(settings),
        "attention.layer_norm_epsilon": f32(settings.number("layer_norm_eps", default=1e-5)),
        "use_parallel_residual": flag(bool(settings.get("use_parallel_residual", False))),
        **rope(settings),
    }


def _starcoder2(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "gelu_pytorch_tanh")
    window = settings.get("sliding_window")
    if window is not None and window < settings.whole("max_position_embeddings"):
        settings.notes.append(
            f"the model attends to the last {window} tokens only, llama.cpp to all of them; "
            "they differ on longer texts"
        )
    return {
        **common(settings),
        "attention.layer_norm_epsilon": f32(settings.number("norm_epsilon", default=1e-5)),
        **rope(settings),
    }


def _phi3(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "silu")
    found = settings.rope()
    partial = float(found["partial_rotary_factor"])
    context = settings.whole("max_position_embeddings")
    original = settings.whole("original_max_position_embeddings", default=context)
    window = settings.get("sliding_window")
    values = {
        **common(settings),
        "attention.layer_norm_rms_epsilon": f32(settings.number("rms_norm_eps", default=1e-5)),
        # llama.cpp tells models without a window by a zero.
        "attention.sliding_window": u32(int(window or 0)),
        "rope.dimension_count": u32(int(settings.width * partial)),
        "rope.freq_base": f32(float(found["rope_theta"])),
        "rope.scaling.original_context_length": u32(original),
    }
    if found["rope_type"] in ("longrope", "su"):
        scale = context / original
        grown = sqrt(1 + log(scale) / log(original)) if scale > 1 else 1.0
        values["rope.scaling.attn_factor"] = f32(float(found.get("attention_factor") or grown))
    elif found["rope_type"] != "default":
        raise PackError(
            f"{settings.label}: config.json scales rotary embeddings by '{found['rope_type']}'; "
            "known for this family are default and longrope"
        )
    return values


def _phi3_factors(settings: Settings) -> Mapping[str, Array]:
    """Factors of LongRoPE for texts within the original context, and for longer ones."""
    found = settings.rope()
    if found["rope_type"] not in ("longrope", "su"):
        return {}
    pairs = int(settings.width * float(found["partial_rotary_factor"])) // 2
    factors = {}
    for key, name in (("long_factor", "rope_factors_long"), ("short_factor", "rope_factors_short")):
        values = np.asarray(found.get(key) or [], np.float32)
        if values.shape != (pairs,):
            raise PackError(
                f"{settings.label}: config.json gives {values.size} values as '{key}'; "
                f"expected {pairs}"
            )
        factors[f"{name}.weight"] = values
    return factors


COHERE = Family("command-r", _cohere, tied=True)
OLMO2 = Family("olmo2", _olmo2)
PHI3 = Family("phi3", _phi3, factors=_phi3_factors)
STABLELM = Family("stablelm", _stablelm)
STARCODER2 = Family("starcoder2", _starcoder2, tied=True)
