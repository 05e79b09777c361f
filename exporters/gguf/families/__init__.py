"""The families of models that GGUF files are made of, and how their tensors are named there.

Sources: names and architectures of gguf-py (`gguf.constants`, `gguf.tensor_mapping`), and what
llama.cpp computes for each of them (``src/models``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from exporters.gguf.arrange import (
    AS_IS,
    Constant,
    Entry,
    Interleaved,
    Layout,
    Placed,
    Portion,
    Regrouped,
    Shifted,
    Stacked,
    Transposed,
)
from exporters.gguf.families.base import Family, Hyperparameters, Settings
from exporters.gguf.families.encoders import BERT, NOMIC_BERT
from exporters.gguf.families.fused import FALCON, GPT_NEOX
from exporters.gguf.families.gemma import GEMMA, GEMMA2, GEMMA3
from exporters.gguf.families.gpt2 import GPT2
from exporters.gguf.families.llama import GRANITE, LLAMA, MISTRAL, MIXTRAL, SMOLLM3
from exporters.gguf.families.others import COHERE, OLMO2, PHI3, STABLELM, STARCODER2
from exporters.gguf.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from exporters.gguf.mixtures import Facts
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError, nearest

__all__ = ["FAMILIES", "Family", "Model", "place_of"]

FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "cohere": COHERE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "falcon": FALCON,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "granite": GRANITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "nomic_bert": NOMIC_BERT,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
}
"""By ``model_type`` of config.json."""

_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<index>\d+)(?P<after>\..+)")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parts of experts that some files keep in one tensor for all experts of a layer."""


class Model:
    """One model as its family has it in GGUF.

    Args:
        config: Contents of config.json.
        label: How the user named the model.

    Attributes:
        family: Its family.
        settings: Its config.

    Raises:
        PackError: The family is not known here, or its config lacks a number that is needed.
    """

    def __init__(self, config: Mapping[str, object], label: str) -> None:
        kind = config.get("model_type")
        family = FAMILIES.get(str(kind))
        if family is None:
            raise PackError(
                f"{label}: models of type '{kind}' have no GGUF here{nearest(str(kind), FAMILIES)}",
                f"Known types: {', '.join(sorted(FAMILIES))}",
            )
        import gguf  # its tables of names are read when they are needed

        self.family = family
        text_config = config.get("text_config")
        if family.nested and isinstance(text_config, Mapping):
            config = {**config, **text_config}
        self.settings = Settings(config, label, tied=family.tied)
        self._label = label
        self._layers = self.settings.whole("num_hidden_layers", "n_layer")
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(numbers[family.architecture], self._layers)

    def hyperparameters(self) -> Hyperparameters:
        """Its numbers, under the keys that llama.cpp reads.

        Raises:
            PackError: llama.cpp does not compute such a model.
        """
        found = self.family.hyperparameters(self.settings)
        return {
            key if key.startswith("tokenizer.") else f"{self.family.architecture}.{key}": value
            for key, value in found.items()
        }

    def facts(self) -> Facts:
        """What the rules about types ask of it."""
        found = self.family.hyperparameters(self.settings)
        heads = found["attention.head_count"].content
        shared = found.get("attention.head_count_kv")
        return Facts(
            self.family.architecture, self._layers, heads,
            heads if shared is None else shared.content, self.settings.experts,
        )  # fmt: skip

    def name(self, tensor: str) -> str:
        """The name of a tensor in GGUF, for example ``blk.0.attn_q.weight``.

        Raises:
            PackError: It has none.
        """
        found = self._map.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PackError(
                f"{self._label}: '{tensor}' has no name in GGUF for {self.family.architecture}",
                "Leave it out, if it is no part of the model.",
            )
        return str(found)

    def layout(self, tensor: str) -> Layout:
        """How a tensor of the model is arranged in GGUF."""
        if self.family.rotated and tensor.endswith(("q_proj.weight", "q_proj.bias")):
            return Interleaved(self.settings.heads)
        if self.family.rotated and tensor.endswith(("k_proj.weight", "k_proj.bias")):
            return Interleaved(self.settings.kv_heads)
        if self.family.order is not None and ".query_key_value." in tensor:
            return Regrouped(self.family.order(self.settings))
        if tensor.endswith(self.family.transposed or ("\0",)):
            return Transposed()
        if tensor.endswith(self.family.shifted or ("\0",)):
            return Shifted(1.0)
        return AS_IS

    def rows_layout(self, tensor: str) -> Layout:
        """How the output rows of a weight are arranged; its columns are in order already."""
        layout = self.layout(tensor)
        return layout if isinstance(layout, Interleaved | Regrouped) else AS_IS

    def tensors(self, checkpoint: Checkpoint) -> list[Entry]:
        """Every tensor of the file: what is outside the layers first, then layer by layer.

        Raises:
            PackError: A tensor has no place in GGUF, two have the same, or one is missing.
        """
        placed: dict[str, Entry] = {}
        stacks: dict[str, dict[int, str]] = {}
        for source in checkpoint.names():
            plain = source.removeprefix(self.family.unprefixed)
            if plain.endswith(self.family.dropped or ("\0",)):
                continue
            if expert := _EXPERT.fullmatch(plain):
                stack = stacks.setdefault(expert["before"] + expert["after"], {})
                stack[int(expert["index"])] = source
            else:
                for entry in self._entries(source, plain):
                    self._add(placed, entry, source)
        for plain, sources in stacks.items():
            if sorted(sources) != list(range(self.settings.experts)):
                raise PackError(
                    f"{self._label}: '{plain}' is there for {len(sources)} experts; the config "
                    f"has {self.settings.experts}",
                    "Give the whole model.",
                )
            order = tuple(sources[index] for index in range(len(sources)))
            self._add(placed, Stacked(self.name(plain), order), order[0])
        for name, values in self.family.factors(self.settings).items():
            placed[name] = Constant(name, values)
        self._check_complete(placed)
        return [placed[name] for name in sorted(placed, key=place_of)]

    def _entries(self, source: str, plain: str) -> list[Entry]:
        """What becomes of one tensor: mostly one, of fused experts two, of a tied head none."""
        before, _, last = plain.rpartition(".")
        if before.endswith(".experts") and last in _FUSED:
            parts = _FUSED[last]
            return [
                Placed(
                    self.name(f"{before}.{part}.weight"), source,
                    Portion(index, len(parts)) if len(parts) > 1 else AS_IS,
                )
                for index, part in enumerate(parts)
            ]  # fmt: skip
        name = self.name(plain)
        if name == "output.weight" and self.settings.tied:
            return []  # the model computes with its embeddings, whatever the file holds
        return [Placed(name, source, self.layout(plain))]

    def _add(self, placed: dict[str, Entry], entry: Entry, source: str) -> None:
        if entry.name in placed:
            raise PackError(
                f"{self._label}: '{source}' and another tensor are both '{entry.name}' in GGUF",
                "Remove the one that does not belong to the model.",
            )
        placed[entry.name] = entry

    def _check_complete(self, names: Mapping[str, object]) -> None:
        """Every layer has what any layer has, and there is something to embed and to predict."""
        by_layer: dict[int, set[str]] = {layer: set() for layer in range(self._layers)}
        for name in names:
            if match := _LAYER.match(name):
                by_layer.setdefault(int(match[1]), set()).add(name[match.end() :])
        whole = set().union(*by_layer.values())
        missing = [f"blk.{n}.{rest}" for n, has in by_layer.items() for rest in whole - has]
        head = ("output.weight",) if self.family.head and not self.settings.tied else ()
        missing += [n for n in (*self.family.needs, *head) if n not in names]
        if missing:
            raise PackError(
                f"{self._label}: lacks {_listed(sorted(missing))} (named as in GGUF)",
                "Give the whole model.",
            )


def place_of(name: str) -> tuple[int, int, str]:
    """What sorts tensors by layer, those outside the layers first."""
    match = _LAYER.match(name)
    return (1, int(match[1]), name) if match else (0, 0, name)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"'{name}'" for name in names[:4]) + more
