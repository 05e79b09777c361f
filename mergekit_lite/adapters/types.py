"""Which path an adapter takes by its type."""

from __future__ import annotations

from mergekit_lite.adapters.config import AdapterConfig
from mergekit_lite.errors import PackError

__all__ = ["check_mergeable", "is_streamed"]

_TO_PEFT = ("use_bdlora", "kasa_config", "monteclora_config")
"""Keys of LoRA configs that make variants whose arithmetic is left to PEFT's layers."""

_NEVER = {
    "alora_invocation_tokens": "aLoRA acts only after certain tokens",
    "arrow_config": "Arrow chooses among adapters token by token",
    "use_qalora": "QA-LoRA belongs to a quantized base",
}
_LOST = {
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
    "pissa_niter": "PiSSA by randomised SVD",
}
"""Initialisations that change the base in a way that cannot be computed again from it."""


def is_streamed(config: AdapterConfig) -> bool:
    """Whether an adapter is LoRA in a form whose arithmetic pack does itself."""
    return config.kind == "LORA" and not any(config.data.get(key) for key in _TO_PEFT)


def check_mergeable(config: AdapterConfig) -> None:
    """Refuse what cannot become a part of the base's weights.

    Raises:
        PackError: The type, or an option of it, cannot be merged.
    """
    beside = "Use it beside its base instead: pack adapters"
    if config.kind != "LORA":
        return
    for key, why in _NEVER.items():
        if config.data.get(key):
            raise PackError(f"{config.label}: cannot be merged; {why} ('{key}')", beside)
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
