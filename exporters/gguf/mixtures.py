"""Which type each tensor of a file gets: the named mixtures of llama.cpp, and what overrides them.

A mixture is a type for most tensors, and rules that give more bits to those which need them. The
names, numbers and rules are those of ``llama-quantize`` (llama_tensor_get_type in llama-quant.cpp),
so that a file of a name is what its users expect; recorded tables in the tests hold them to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_lite.errors import PackError, nearest
from mergekit_lite.kernels.blocks.types import TYPES, TensorType

__all__ = ["MIXTURES", "Facts", "Mixture", "Overrides", "choose_types", "find_mixture", "find_type"]


@dataclass(frozen=True)
class Mixture:
    """What a user asks for: a name for the types of all tensors of a file.

    Attributes:
        name: In lower case.
        number: ``general.file_type``.
        most: Name of the type of most tensors.
        summary: What it is for, in a few words.
    """

    name: str
    number: int
    most: str
    summary: str


MIXTURES: Mapping[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        Mixture("f32", 0, "F32", "32 bits, exact for any model"),
        Mixture("bf16", 32, "BF16", "16 bits, exact for bfloat16 models"),
        Mixture("f16", 1, "F16", "16 bits"),
        Mixture("q8_0", 7, "Q8_0", "8.5 bits, nearly without loss"),
        Mixture("q6_k", 18, "Q6_K", "6.6 bits, very small loss"),
        Mixture("q5_k_m", 17, "Q5_K", "5.7 bits, small loss"),
        Mixture("q5_k_s", 16, "Q5_K", "5.5 bits, small loss"),
        Mixture("q4_k_m", 15, "Q4_K", "4.8 bits, the usual choice"),
        Mixture("q4_k_s", 14, "Q4_K", "4.6 bits"),
        Mixture("iq4_nl", 25, "IQ4_NL", "4.5 bits, values closer near zero"),
        Mixture("iq4_xs", 30, "IQ4_XS", "4.3 bits, values closer near zero"),
        Mixture("mxfp4_moe", 38, "MXFP4", "4.3 bits for experts, q8_0 for the rest"),
        Mixture("q3_k_l", 13, "Q3_K", "4.3 bits"),
        Mixture("q3_k_m", 12, "Q3_K", "3.9 bits"),
        Mixture("q3_k_s", 11, "Q3_K", "3.5 bits"),
        Mixture("q2_k", 10, "Q2_K", "3.2 bits, large loss"),
        Mixture("q2_k_s", 21, "Q2_K", "3 bits, large loss; wants an importance matrix"),
        Mixture("q5_1", 9, "Q5_1", "6 bits, older"),
        Mixture("q5_0", 8, "Q5_0", "5.5 bits, older"),
        Mixture("q4_1", 3, "Q4_1", "5 bits, older"),
        Mixture("q4_0", 2, "Q4_0", "4.5 bits, older, fast on some processors"),
        Mixture("tq2_0", 37, "TQ2_0", "2.1 bits, for models trained ternary"),
        Mixture("tq1_0", 36, "TQ1_0", "1.7 bits, for models trained ternary"),
        Mixture("iq3_m", 27, "IQ3_S", "3.7 bits, codebooks"),
        Mixture("iq3_s", 26, "IQ3_S", "3.5 bits, codebooks"),
        Mixture("iq3_xs", 22, "IQ3_S", "3.3 bits, codebooks; needs an importance matrix"),
        Mixture("iq3_xxs", 23, "IQ3_XXS", "3.1 bits, codebooks; needs an importance matrix"),
        Mixture("iq2_m", 29, "IQ2_S", "2.7 bits, codebooks; needs an importance matrix"),
        Mixture("iq2_s", 28, "IQ2_XS", "2.5 bits, codebooks; needs an importance matrix"),
        Mixture("iq2_xs", 20, "IQ2_XS", "2.3 bits, codebooks; needs an importance matrix"),
        Mixture("iq2_xxs", 19, "IQ2_XXS", "2.1 bits, codebooks; needs an importance matrix"),
        Mixture("iq1_m", 31, "IQ1_M", "1.8 bits, codebooks; needs an importance matrix"),
        Mixture("iq1_s", 24, "IQ1_S", "1.6 bits, codebooks; needs an importance matrix"),
    )
}
"""By name, largest first within a kind."""

_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

_KEPT_FLOAT = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "attn_rel_b.weight", "time_mix_",
)  # fmt: skip
"""Parts of names of matrices that stay float32: small, or added to activations."""

_KEPT_FLOAT_NAMES = ("position_embd.weight", "token_types.weight")

_NEED_IMPORTANCE = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")

_FALLBACKS = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
    ),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Types with blocks of 32 that stand in where a row is no multiple of 256."""


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a model.

    Attributes:
        architecture: gguf's name of it.
        layers: Number of layers.
        heads: Attention heads of the first layer.
        kv_heads: Heads of its keys and values.
        experts: Number of experts of a layer; 0 without.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def shared(self) -> int:
        """How many heads share one head of keys and values."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes the model for one of 70 billion weights, by its layers."""
        if self.architecture == "llama":
            return self.layers == 80 and self.heads != self.kv_heads
        return self.layers == 80 and self.architecture in ("qwen2", "deci", "olmo")


@dataclass(frozen=True)
class Overrides:
    """What a user sets beside the mixture.

    Attributes:
        patterns: Regular expressions that are searched for in names, each with a type; the first
            that is found holds.
        output: Type of the output matrix, or of the embedding that is tied to it.
        embedding: Type of the token embedding.
        pure: Whether all matrices get the mixture's main type.
    """

    patterns: Sequence[tuple[str, TensorType]] = ()
    output: TensorType | None = None
    embedding: TensorType | None = None
    pure: bool = False


@dataclass
class _State:
    """What is counted while types are given out, layer by layer."""

    facts: Facts
    mixture: str
    importance: bool
    overrides: Overrides
    tied: bool
    values: int
    value: int = 0
    downs: int = 0
    used: set[str] = field(default_factory=set)


def find_mixture(name: str) -> Mixture:
    """Find a mixture by name.

    Raises:
        PackError: There is none.
    """
    key = name.lower().replace("-", "_")
    found = MIXTURES.get(_ALIASES.get(key, key))
    if found is None:
        raise PackError(
            f"'{name}': no type of GGUF{nearest(key, [*MIXTURES, *_ALIASES])}",
            f"Known types: {', '.join(MIXTURES)}",
        )
    return found


def find_type(name: str) -> TensorType:
    """Find the type of a tensor by name.

    Raises:
        PackError: There is none.
    """
    found = TYPES.get(name.upper())
    if found is None:
        raise PackError(
            f"'{name}': no type of a tensor{nearest(name.upper(), TYPES)}",
            f"Known types: {', '.join(TYPES).lower()}",
        )
    return found


def choose_types(
    shapes: Mapping[str, tuple[int, ...]],
    facts: Facts,
    mixture: Mixture,
    overrides: Overrides | None = None,
    importance: bool = False,
) -> dict[str, TensorType]:
    """The type of every tensor.

    Args:
        shapes: Rows first, by name in GGUF.
        facts: Of the model.
        mixture: What was asked for.
        overrides: What goes before it.
        importance: Whether there is an importance matrix.

    Raises:
        PackError: An override fits no tensor, or a type needs an importance matrix.
    """
    overrides = overrides or Overrides()
    state = _State(
        facts, mixture.name, importance, overrides,
        tied="output.weight" not in shapes,
        values=sum(_is_value(name) for name in shapes),
    )  # fmt: skip
    chosen = {
        name: _choose(state, name, shapes[name], mixture) for name in sorted(shapes, key=_by_layer)
    }
    unused = [p for p, _ in overrides.patterns if p not in state.used]
    if unused:
        raise PackError(
            f"--tensor-type {unused[0]}=…: fits no tensor that is quantized",
            "Patterns are searched for in GGUF's names, for example: attn_v, blk.0.ffn_down",
        )
    return {name: chosen[name] for name in shapes}


def _by_layer(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def _choose(state: _State, name: str, shape: tuple[int, ...], mixture: Mixture) -> TensorType:
    if not _is_quantized(name, shape):
        return TYPES["F32"]
    overrides = state.overrides
    if overrides.embedding is not None and name == "token_embd.weight":
        return overrides.embedding
    if overrides.output is not None and name == "output.weight":
        return overrides.output
    for pattern, kind in overrides.patterns:
        if re.search(pattern, name):
            state.used.add(pattern)
            return kind
    if mixture.most in ("F32", "F16", "BF16"):
        return TYPES[mixture.most]
    chosen = mixture.most if overrides.pure else _by_rules(state, name, shape, mixture.most)
    if not state.importance and _needs_importance(name, chosen, mixture.name):
        raise PackError(
            f"{mixture.name} needs an importance matrix: '{name}' becomes {chosen}",
            "Give one: --imatrix FILE; llama-imatrix of llama.cpp makes it.",
        )
    return _fitting(chosen, shape[-1])


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    matrix = len(shape) >= 2 and any(size > 1 for size in shape[:-1])
    kept = any(part in name for part in _KEPT_FLOAT) or name in _KEPT_FLOAT_NAMES
    return matrix and name.endswith("weight") and not kept


def _needs_importance(name: str, kind: str, mixture: str) -> bool:
    if name in ("token_embd.weight", "output.weight"):
        return False
    return kind in _NEED_IMPORTANCE or (kind == "Q2_K" and mixture == "q2_k_s")


def _fitting(kind: str, columns: int) -> TensorType:
    """The type itself, or one with smaller blocks where a row is no multiple of its block."""
    if columns % TYPES[kind].block == 0:
        return TYPES[kind]
    smaller = TYPES[_FALLBACKS.get(kind, kind)]
    return smaller if columns % smaller.block == 0 else TYPES["F16"]


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _by_rules(state: _State, name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type by what a tensor is for."""
    mixture = state.mixture
    if name == "output.weight" or (state.tied and name == "token_embd.weight"):
        return _output(state, shape, kind)
    if mixture == "mxfp4_moe":
        return "MXFP4" if len(shape) == 3 and shape[0] > 1 else "Q8_0"
    if name == "token_embd.weight":
        return _embedding(mixture, kind)
    low = mixture in ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq1_s", "iq1_m")
    if _is_value(name):
        position = state.value
        state.value += 1
        return _low_value(state, kind) if low else _value(state, kind, position)
    if "attn_k.weight" in name:
        return _key(state, kind, low=low)
    if "attn_q.weight" in name:
        return {"iq3_xs": "IQ3_XXS", "iq3_xxs": "IQ2_S"}.get(mixture, kind)
    if "attn_output.weight" in name:
        return _attention_output(state, kind, low=low)
    if "ffn_down" in name:
        layer = _by_layer(name)[0] if state.facts.experts > 1 and not low else state.downs
        state.downs += 1
        return _down(state, kind, layer, low=low)
    if "ffn_up" in name or "ffn_gate" in name:
        return _up(state, name, kind)
    return kind


def _output(state: _State, shape: tuple[int, ...], kind: str) -> str:
    if state.overrides.output is not None:
        return state.overrides.output.name
    falcon = state.facts.architecture == "falcon"
    if state.mixture == "mxfp4_moe" or falcon or shape[-1] % TYPES[kind].block:
        return "Q8_0"
    if state.mixture in ("iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq2_s", "iq2_m", "iq1_m"):
        return "Q5_K"
    return kind if kind == "Q8_0" else "Q6_K"


def _embedding(mixture: str, kind: str) -> str:
    special = {
        **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), "Q2_K"),
        **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "IQ3_S"),
        **dict.fromkeys(("tq1_0", "tq2_0"), "Q4_K"),
    }
    return special.get(mixture, kind)


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _low_value(state: _State, _kind: str) -> str:
    if state.facts.shared >= 4 or state.facts.experts >= 4:
        return "Q4_K"
    return "IQ3_S" if state.mixture in ("iq2_s", "iq2_m") else "Q2_K"


def _value(state: _State, kind: str, position: int) -> str:
    mixture = state.mixture
    shared = state.facts.shared >= 4
    chosen = kind
    if mixture == "q2_k":
        chosen = "Q4_K" if shared else "Q3_K"
    elif mixture == "iq3_xxs":
        chosen = "Q4_K" if shared else "IQ3_XXS" if state.importance else "IQ3_S"
    elif (mixture in ("q2_k_s", "iq3_xs", "iq3_s") and shared) or mixture == "iq3_m":
        chosen = "Q4_K"
    elif mixture == "q3_k_m":
        chosen = "Q5_K" if position < 2 else "Q4_K"
    elif mixture == "q3_k_l" or (mixture in ("iq4_nl", "iq4_xs") and shared):
        chosen = "Q5_K"
    elif mixture in ("q4_k_m", "q5_k_m") and _more_bits(position, state.values):
        chosen = "Q6_K"
    elif mixture == "q4_k_s" and position < 4:
        chosen = "Q5_K"
    if state.facts.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if state.facts.experts == 8 else chosen


def _key(state: _State, kind: str, *, low: bool) -> str:
    if state.facts.experts == 8:
        return "Q4_K" if low else "Q8_0"
    return {"iq3_xs": "IQ3_XXS", "iq3_xxs": "IQ2_S"}.get(state.mixture, kind)


def _attention_output(state: _State, kind: str, *, low: bool) -> str:
    mixture = state.mixture
    if low:
        if state.facts.experts == 8:
            return "Q5_K"
        special = {"iq1_s": "IQ2_XXS", "iq1_m": "IQ2_XXS", "iq2_s": "IQ3_S", "iq2_m": "IQ3_S"}
        return special.get(mixture, kind)
    if state.facts.architecture == "falcon":
        return "Q4_K" if mixture == "q3_k_l" else kind
    if state.facts.experts == 8:
        raised = (
            "q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s",
            "iq3_m", "iq4_xs",
        )  # fmt: skip
        return "Q5_K" if mixture in raised else kind
    special = {
        "q2_k": "Q3_K", "iq3_xxs": "IQ3_S", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K", "iq3_m": "Q4_K",
    }  # fmt: skip
    return special.get(mixture, kind)


def _down(state: _State, kind: str, layer: int, *, low: bool) -> str:
    mixture, layers = state.mixture, state.facts.layers
    first = layer < layers // 8
    if low:
        return ("IQ3_S" if mixture in ("iq2_s", "iq2_m") else "Q2_K") if first else kind
    more = _more_bits(layer, layers)
    falcon = state.facts.architecture == "falcon"
    chosen = kind
    if mixture == "q2_k":
        chosen = "Q3_K"
    elif mixture == "q2_k_s":
        chosen = "Q4_K" if first else kind
    elif mixture == "iq3_xxs" and not state.importance:
        chosen = "Q4_K" if first else "Q3_K"
    elif mixture == "q3_k_m":
        early = layer < layers // 16
        chosen = "Q5_K" if early else "Q4_K" if not falcon or more else "Q3_K"
    elif mixture == "iq3_m":
        chosen = "Q4_K" if first or (state.facts.experts == 8 and more) else kind
    elif mixture == "q3_k_l":
        chosen = "Q4_K" if falcon else "Q5_K"
    elif mixture == "q4_k_m" and falcon:
        chosen = "Q6_K" if layer < layers // 16 else "Q5_K" if more else "Q4_K"
    elif mixture in ("q4_k_m", "q5_k_m"):
        chosen = "Q6_K" if more else kind
    elif mixture in ("iq4_nl", "iq4_xs"):
        chosen = "Q5_K" if first and not state.importance else kind
    elif mixture == "q4_k_s":
        chosen = "Q5_K" if first and not falcon else kind
    elif mixture in ("q4_0", "q5_0") and state.importance and first:
        chosen = "Q4_1" if mixture == "q4_0" else "Q5_1"
    return chosen


def _up(state: _State, name: str, kind: str) -> str:
    if state.mixture != "iq3_xs":
        return kind
    layer, layers = _by_layer(name)[0], state.facts.layers
    return "IQ3_XXS" if layers // 8 <= layer < 7 * layers // 8 else kind
