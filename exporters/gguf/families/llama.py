"""Llama 2 and 3, Mistral, Mixtral, and the families that share their layers: Granite, SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi

import numpy as np

from exporters.gguf.families.base import Family, Hyperparameters, Settings, common, experts, rope
from exporters.gguf.metadata import f32
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["GRANITE", "LLAMA", "MISTRAL", "MIXTRAL", "SMOLLM3"]


def _llama(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "silu")
    epsilon = settings.number("rms_norm_eps", default=1e-6)
    return common(settings) | {"attention.layer_norm_rms_epsilon": f32(epsilon)} | rope(settings)


def _mistral(settings: Settings) -> Hyperparameters:
    window = settings.get("sliding_window")
    if window is not None and window < settings.whole("max_position_embeddings"):
        settings.notes.append(
            f"the model attends to the last {window} tokens only, llama.cpp to all of them; "
            "they differ on longer texts"
        )
    return _llama(settings)


def _mixtral(settings: Settings) -> Hyperparameters:
    return _mistral(settings) | experts(settings)


def _granite(settings: Settings) -> Hyperparameters:
    multipliers = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    scales = {name: f32(settings.number(key, default=1.0)) for name, key in multipliers.items()}
    return _llama(settings) | scales


def _smollm3(settings: Settings) -> Hyperparameters:
    layers = settings.whole("num_hidden_layers")
    rotated = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if settings.get("no_rope_layers", rotated) != rotated:
        raise PackError(
            f"{settings.label}: config.json gives other 'no_rope_layers' than every fourth; "
            "llama.cpp computes those only"
        )
    settings.expect("use_sliding_window", False)
    return _llama(settings)


def _frequency_factors(settings: Settings) -> Mapping[str, Array]:
    """What each rotary frequency is divided by in Llama 3.1 and later.

    Long waves are slowed down by the factor, short ones are kept, and those between are blended.
    Source: ``_compute_llama3_parameters`` of transformers.
    """
    found = settings.rope()
    if found["rope_type"] != "llama3":
        return {}
    dimensions = int(settings.width * float(found["partial_rotary_factor"]))
    exponent = np.arange(0, dimensions, 2, dtype=np.float64) / dimensions
    wavelength = 2 * pi * float(found["rope_theta"]) ** exponent
    original = float(found["original_max_position_embeddings"])
    low, high = float(found["low_freq_factor"]), float(found["high_freq_factor"])
    kept = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    speed = (1 - kept) / float(found["factor"]) + kept
    return {"rope_freqs.weight": (1 / speed).astype(np.float32)}


LLAMA = Family("llama", _llama, rotated=True, factors=_frequency_factors)
MISTRAL = Family("llama", _mistral, rotated=True, factors=_frequency_factors)
MIXTRAL = Family("llama", _mixtral, rotated=True)
GRANITE = Family("granite", _granite, rotated=True, factors=_frequency_factors)
SMOLLM3 = Family("smollm3", _smollm3, rotated=True, tied=True, factors=_frequency_factors)
