"""The tensors of a LoRA, sorted by what they are: factors of a module, whole tensors, rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_lite.checkpoint.protocol import Checkpoint

__all__ = ["PREFIX", "TIED", "LoraContents", "LoraModule", "sort_tensors"]

PREFIX = "base_model.model."
"""What PEFT's ``save_pretrained`` puts before the path of a module."""

TIED = "tied_output_embedding"
"""Key in the metadata of a safetensors file: the path of an output embedding of which the adapter
says what it says of the input embedding, so that a tied model stays tied when it is merged."""

_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector|lora_magnitude_vector\.weight)"
)
_WRAPPERS = (".base_layer", ".token_adapter", ".original_module")
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TRAINING_ONLY = ".lora_velora_embed"


@dataclass(frozen=True)
class LoraModule:
    """The tensors of one adapted module.

    Attributes:
        path: Of the module in the model.
        depth: How many wrappers lie between it and the module, where parameters are adapted.
        parts: Names of its tensors by part: ``lora_A``, ``lora_B``, ``lora_B.bias``,
            ``lora_embedding_A``, ``lora_embedding_B``, ``lora_magnitude_vector``.
    """

    path: str
    depth: int
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def embedding(self) -> bool:
        """Whether it is an embedding, whose factors are stored the other way round."""
        return "lora_embedding_A" in self.parts or "lora_embedding_B" in self.parts

    @property
    def factors(self) -> tuple[str, str]:
        """Names of the parts that hold A and B."""
        if self.embedding:
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A", "lora_B"


@dataclass(frozen=True)
class LoraContents:
    """All tensors of a LoRA.

    Attributes:
        modules: Adapted modules.
        whole: Names of tensors that are carried whole, by path of the parameter.
        copies: Names of the base's own weights, saved beside factors on them (PEFT does so with
            embeddings, which may have been resized), by path of the parameter.
        rows: Names of trained rows of embeddings, by path of the module.
        leftovers: Names that are none of these.
    """

    modules: Sequence[LoraModule]
    whole: Mapping[str, str]
    copies: Mapping[str, str]
    rows: Mapping[str, str]
    leftovers: Sequence[str]


def sort_tensors(tensors: Checkpoint) -> LoraContents:
    """Sort the tensors of an adapter by their names alone."""
    modules: dict[tuple[str, int], LoraModule] = {}
    whole: dict[str, str] = {}
    copies: dict[str, str] = {}
    rows: dict[str, str] = {}
    leftovers: list[str] = []
    for name in tensors.names():
        path = name.removeprefix(PREFIX)
        match = _PARTS.fullmatch(path)
        if path == name:
            leftovers.append(name)
        elif path.endswith(_TOKENS):
            rows[_unwrapped(path.removesuffix(_TOKENS))] = name
        elif match:
            key = _unwrapped(match["module"]), match["module"].count(".base_layer")
            module = modules.setdefault(key, LoraModule(*key))
            module.parts[match["part"].removesuffix(".weight")] = name
        elif path.endswith(_TRAINING_ONLY):
            continue
        elif ".lora_" in path:
            leftovers.append(name)
        elif path.endswith(".base_layer.weight"):
            copies[_unwrapped(path)] = name
        else:
            whole[_unwrapped(path)] = name
    return LoraContents(list(modules.values()), whole, copies, rows, leftovers)


def _unwrapped(path: str) -> str:
    """A module's path without what PEFT puts around it."""
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper + ".", ".").removesuffix(wrapper)
    return re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", path)
