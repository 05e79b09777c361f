"""What is particular to each family of models in GGUF, as a table.

Sources: the tensor names and architectures of gguf-py (`gguf.constants`, `gguf.tensor_mapping`);
that llama.cpp pairs the halves of rotated heads in the order of the original Llama release, while
Hugging Face stores them one half after the other (`ggml_rope_ext` with mode 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["FAMILIES", "Family", "Naming", "interleaved_halves"]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: gguf's name for it.
        rotated: Whether rows of query and key projections are reordered.
    """

    architecture: str
    rotated: bool = False


FAMILIES: Mapping[str, Family] = {
    "cohere": Family("command-r"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "gpt2": Family("gpt2"),
    "granite": Family("granite", rotated=True),
    "llama": Family("llama", rotated=True),
    "mistral": Family("llama", rotated=True),
    "olmo2": Family("olmo2"),
    "phi3": Family("phi3"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "smollm3": Family("smollm3", rotated=True),
    "stablelm": Family("stablelm"),
    "starcoder2": Family("starcoder2"),
}
"""By ``model_type`` of config.json."""


class Naming:
    """Names and row orders of one model's tensors in GGUF.

    Raises:
        PackError: The family is not known here, or its config lacks a number that is needed.
    """

    def __init__(self, config: Mapping[str, object], label: str) -> None:
        import gguf

        kind = config.get("model_type")
        family = FAMILIES.get(str(kind))
        if family is None:
            raise PackError(
                f"{label}: models of type '{kind}' have no GGUF names here",
                f"Known types: {', '.join(sorted(FAMILIES))}",
            )
        self.family = family
        self._label = label
        layers = self._number(config, "num_hidden_layers", "n_layer")
        by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(by_name[family.architecture], layers)
        self._heads = self._number(config, "num_attention_heads", "n_head")
        kv_heads = config.get("num_key_value_heads")
        self._kv_heads = kv_heads if isinstance(kv_heads, int) else self._heads

    def name(self, tensor: str) -> str:
        """The name of a tensor in GGUF, for example ``blk.0.attn_q.weight``.

        Raises:
            PackError: It has none.
        """
        found: Any = self._map.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PackError(
                f"{self._label}: '{tensor}' has no name in GGUF for {self.family.architecture}",
                "Leave it out of the adapter, or merge the adapter into its base.",
            )
        return str(found)

    def ordered(self, tensor: str, rows: Array) -> Array:
        """Rows of a weight, ``(out, …)``, in the order in which GGUF has them."""
        if not self.family.rotated:
            return rows
        if tensor.endswith("q_proj.weight"):
            return interleaved_halves(rows, self._heads)
        if tensor.endswith("k_proj.weight"):
            return interleaved_halves(rows, self._kv_heads)
        return rows

    def _number(self, config: Mapping[str, object], *keys: str) -> int:
        for key in keys:
            value = config.get(key)
            if isinstance(value, int):
                return value
        raise PackError(
            f"{self._label}: its base's config.json has no '{keys[0]}'", "Give the whole base."
        )


def interleaved_halves(rows: Array, heads: int) -> Array:
    """Reorder rows so that the two halves of each head alternate.

    Args:
        rows: ``(heads · width, …)``, each head's first half before its second.
        heads: Number of heads.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
