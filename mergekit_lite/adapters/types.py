"""Every type of adapter that PEFT knows, and what becomes of it."""

from __future__ import annotations

from mergekit_lite.adapters.config import AdapterConfig
from mergekit_lite.errors import PackError, nearest

__all__ = [
    "FROM_WHOLE_BASE",
    "MERGED",
    "ONE_BY_ONE",
    "OUTLINED",
    "REFUSED",
    "check_mergeable",
    "is_made_from_base",
    "is_shaped_by_base",
    "is_streamed",
]

MERGED = {
    "LORA": "streamed",
    **dict.fromkeys(
        (
            "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD",
            "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT",
            "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
            "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
        ),
        "by PEFT's layers",
    ),
}  # fmt: skip
"""Types that become a part of the base's weights, and how."""

REFUSED = {
    "ADAPTION_PROMPT": "it adds tokens to attention, not to weights",
    "CARTRIDGE": "it is a trained key-value cache, not a change of weights",
    "CPT": "it is a trained prompt, not a change of weights",
    "LILY": "its layers choose among shared factors by their input",
    "MULTITASK_PROMPT_TUNING": "it is a trained prompt, not a change of weights",
    "POLY": "it mixes its factors by task, while the model runs",
    "PREFIX_TUNING": "it is a trained key-value prefix, not a change of weights",
    "PROMPT_TUNING": "it is a trained prompt, not a change of weights",
    "P_TUNING": "it is a trained prompt encoder, not a change of weights",
    "SHADOW": "what it adds depends on the input",
    "XLORA": "it mixes adapters token by token",
}
"""Types that cannot become a part of the base's weights, and why."""

_FROM_BASE = frozenset({"ADAMSS", "DELORA", "PSOFT", "SUPERTUNING", "TINYLORA"})

ONE_BY_ONE = frozenset({"OSF"})
"""Types whose layers decompose their weight and hold all of it; created for a module at a time."""

OUTLINED = frozenset({"DELORA", "PSOFT", "SUPERTUNING", "TINYLORA"})
"""Types that decompose every weight, which is not done for shapes alone."""

_SHAPED_BY_BASE = frozenset({"ADAMSS"})
"""Types that cluster the base's weights, so that these decide what tensors there are."""

FROM_WHOLE_BASE = frozenset({"FROD"})
"""Types that compute a part of themselves from all the weights that they adapt at once."""

_TO_PEFT = ("use_bdlora", "monteclora_config")
"""Keys of LoRA configs that make variants whose arithmetic is left to PEFT's layers."""

_NEVER = {
    "alora_invocation_tokens": "aLoRA acts only after certain tokens",
    "arrow_config": "Arrow chooses among adapters token by token",
    "kasa_config": "KaSA cuts the base's weights when it is created",
    "use_qalora": "QA-LoRA belongs to a quantized base",
}
_LOST = {
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
    "pissa_niter": "PiSSA by randomised SVD",
}
"""Initialisations that change the base in a way that cannot be computed again from it."""

_BESIDE = "Use it beside its base instead: pack adapters"


def is_streamed(config: AdapterConfig) -> bool:
    """Whether an adapter is LoRA in a form whose arithmetic pack does itself."""
    return config.kind == "LORA" and not any(config.data.get(key) for key in _TO_PEFT)


def is_made_from_base(config: AdapterConfig) -> bool:
    """Whether layers compute a part of themselves from the base when they are created."""
    return config.kind in _FROM_BASE | FROM_WHOLE_BASE


def is_shaped_by_base(config: AdapterConfig) -> bool:
    """Whether the shapes of an adapter's tensors cannot be told without the base's weights."""
    return config.kind in _SHAPED_BY_BASE


def check_mergeable(config: AdapterConfig) -> None:
    """Refuse what cannot become a part of the base's weights.

    Raises:
        PackError: The type is unknown, or it or an option of it cannot be merged.
    """
    if config.kind in REFUSED:
        raise PackError(
            f"{config.label}: an adapter of type {config.kind} cannot be merged; "
            f"{REFUSED[config.kind]}",
            _BESIDE,
        )
    if config.kind not in MERGED:
        raise PackError(
            f"{config.label}: unknown type of adapter '{config.kind}'"
            f"{nearest(config.kind, MERGED)}",
            "If it is of a newer PEFT: " + _BESIDE[0].lower() + _BESIDE[1:],
        )
    if config.kind != "LORA":
        return
    for key, why in _NEVER.items():
        if config.data.get(key):
            raise PackError(f"{config.label}: cannot be merged; {why} ('{key}')", _BESIDE)
    _check_initialisation(config)


def _check_initialisation(config: AdapterConfig) -> None:
    initial = config.data.get("init_lora_weights")
    for start, name in _LOST.items():
        if isinstance(initial, str) and initial.lower().startswith(start):
            raise PackError(
                f"{config.label}: was initialised by {name}, which changed the base as well, and "
                "was saved without being converted back",
                "Save it again with save_pretrained(…, path_initial_model_for_weight_conversion=…)."
                " If the base you give is the changed one, set 'init_lora_weights' to true in "
                "adapter_config.json.",
            )
