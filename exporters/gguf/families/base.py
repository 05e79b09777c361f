"""What a family of models has to say of itself, and what most of them say alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from exporters.gguf.metadata import Value, f32, text, u32
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["Family", "Hyperparameters", "Settings", "attention", "common", "experts", "rope"]

Hyperparameters = dict[str, Value]
"""Values by key without the architecture before it, for example ``attention.head_count``."""


class Settings:
    """Typed reading of a config.json; every mistake names the model and the key.

    Args:
        config: The contents of the file.
        label: How the user named the model.
        tied: Whether the head shares the embeddings where the config does not say.

    Attributes:
        notes: What the user should know of the conversion.
    """

    def __init__(self, config: Mapping[str, object], label: str, *, tied: bool = False) -> None:
        self.label = label
        self.notes: list[str] = []
        self._config = config
        self._tied = tied

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it stands there; the default also where it is null."""
        value = self._config.get(key)
        return default if value is None else value

    def whole(self, *keys: str, default: int | None = None) -> int:
        """The first of these keys that is there, as a positive whole number.

        Raises:
            PackError: None of them is there and there is no default, or it is no such number.
        """
        value = self._first(keys, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self._fail(keys[0], value, "a positive whole number")
        return int(value)

    def number(self, *keys: str, default: float | None = None) -> float:
        """The first of these keys that is there, as a number.

        Raises:
            PackError: None of them is there and there is no default, or it is no number.
        """
        value = self._first(keys, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._fail(keys[0], value, "a number")
        return float(value)

    def expect(self, key: str, *known: object) -> None:
        """Check that a value, where it is given, is one that llama.cpp computes.

        Raises:
            PackError: It is another one.
        """
        value = self._config.get(key)
        if value is not None and value not in known:
            expected = " or ".join(repr(one) for one in known) or "nothing"
            raise PackError(
                f"{self.label}: config.json gives '{key}' as {value!r:.60}; "
                f"llama.cpp computes {expected} for this family",
                "This model cannot be run by llama.cpp.",
            )

    @property
    def tied(self) -> bool:
        """Whether the head shares the embeddings."""
        return bool(self.get("tie_word_embeddings", self._tied))

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.whole("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.whole("num_key_value_heads", default=self.heads)

    @property
    def experts(self) -> int:
        """Number of experts of a layer; 0 without."""
        value = self._first(("num_local_experts", "num_experts", "n_routed_experts"), 0)
        return int(value) if isinstance(value, int) else 0

    @property
    def width(self) -> int:
        """Elements of a head."""
        return self.whole("head_dim", default=self.whole("hidden_size", "n_embd") // self.heads)

    def rope(self, kind: str = "full_attention") -> Mapping[str, Any]:
        """Rotary embeddings, written as transformers 5 does, whichever version wrote the config.

        Args:
            kind: Of the attention, where layers differ in it.
        """
        found: Mapping[str, Any] = self.get("rope_parameters") or {}
        nested = found.get(kind)
        if isinstance(nested, Mapping):
            found = nested
        scaling = dict(self.get("rope_scaling") or {})
        scaling.setdefault("rope_type", scaling.pop("type", "default"))
        whole = {"rope_theta": self.get("rope_theta", 10000.0), **scaling, **found}
        whole.setdefault("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        return whole

    def _first(self, keys: tuple[str, ...], default: Any) -> Any:
        return next((v for k in keys if (v := self._config.get(k)) is not None), default)

    def _fail(self, key: str, value: object, expected: str) -> None:
        found = "does not say" if value is None else f"gives as {value!r:.40}"
        raise PackError(
            f"{self.label}: config.json {found} '{key}'; expected {expected}",
            "Give the whole model, with the config that it was published with.",
        )


def _no_factors(_settings: Settings) -> Mapping[str, Array]:
    return {}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: gguf's name for it.
        hyperparameters: Reads them from a config; refuses what llama.cpp does not compute.
        rotated: Whether rows of query and key projections are interleaved.
        transposed: Ends of the names of weights that are stored ``(in, out)``.
        shifted: Ends of the names of weights that the model adds 1 to; GGUF holds the sum.
        dropped: Ends of the names of buffers that GGUF does without.
        tied: Whether the head shares the embeddings where the config does not say.
        factors: Tensors that follow from the config alone.
        order: Order of groups of rows of fused queries, keys and values.
        needs: Tensors that every model of the family has.
        head: Whether there is an output matrix, its own or the embedding.
        unprefixed: Beginning of names that GGUF's names do without.
        nested: Whether the config of the text model lies in ``text_config``.
    """

    architecture: str
    hyperparameters: Callable[[Settings], Hyperparameters]
    rotated: bool = False
    transposed: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = (".rotary_emb.inv_freq",)
    tied: bool = False
    factors: Callable[[Settings], Mapping[str, Array]] = _no_factors
    order: Callable[[Settings], tuple[int, ...]] | None = None
    needs: tuple[str, ...] = ("token_embd.weight", "output_norm.weight")
    head: bool = True
    unprefixed: str = ""
    nested: bool = False


def common(settings: Settings) -> Hyperparameters:
    """Sizes of a model, as nearly every family gives them."""
    return {
        "block_count": u32(settings.whole("num_hidden_layers", "n_layer")),
        "context_length": u32(settings.whole("max_position_embeddings", "n_ctx", "n_positions")),
        "embedding_length": u32(settings.whole("hidden_size", "n_embd")),
        "feed_forward_length": u32(settings.whole("intermediate_size", "n_inner")),
        **attention(settings),
        "vocab_size": u32(settings.whole("vocab_size")),
    }


def experts(settings: Settings, width: str = "moe_intermediate_size") -> Hyperparameters:
    """Numbers of experts, and their width where it is not that of a dense layer."""
    found = {
        "expert_count": u32(settings.experts),
        "expert_used_count": u32(settings.whole("num_experts_per_tok")),
    }
    if settings.get(width) is not None:
        found["expert_feed_forward_length"] = u32(settings.whole(width))
    return found


def attention(settings: Settings) -> Hyperparameters:
    """Heads and their width."""
    found = {
        "attention.head_count": u32(settings.heads),
        "attention.head_count_kv": u32(settings.kv_heads),
    }
    if settings.width * settings.heads != settings.whole("hidden_size", "n_embd"):
        found["attention.key_length"] = u32(settings.width)
        found["attention.value_length"] = u32(settings.width)
    return found


def rope(settings: Settings, kind: str = "full_attention") -> Hyperparameters:
    """Rotary embeddings without, with linear, with YaRN or with Llama 3's scaling.

    The factors of Llama 3 are a tensor, see `exporters.gguf.families.llama`.

    Raises:
        PackError: The scaling is one that llama.cpp does not compute.
    """
    found = settings.rope(kind)
    partial = float(found["partial_rotary_factor"])
    values = {
        "rope.dimension_count": u32(int(settings.width * partial)),
        "rope.freq_base": f32(float(found["rope_theta"])),
    }
    scaling = found["rope_type"]
    if scaling in ("linear", "yarn"):
        values["rope.scaling.type"] = text(scaling)
        values["rope.scaling.factor"] = f32(float(found["factor"]))
    if scaling == "yarn":
        values |= _yarn(settings, found)
    elif scaling not in ("default", "linear", "llama3"):
        raise PackError(
            f"{settings.label}: config.json scales rotary embeddings by '{scaling}'; "
            "known here are default, linear, llama3 and yarn",
            "Remove the scaling to convert the model for its original context.",
        )
    return values


def _yarn(settings: Settings, found: Mapping[str, Any]) -> Hyperparameters:
    """Source: Peng et al., "YaRN", arXiv:2309.00071, and ``rope_yarn`` in ggml."""
    original = found.get("original_max_position_embeddings")
    values = {
        "rope.scaling.original_context_length": u32(
            int(original or settings.whole("max_position_embeddings"))
        )
    }
    if found.get("truncate") is False or found.get("mscale") or found.get("mscale_all_dim"):
        raise PackError(
            f"{settings.label}: config.json sets 'truncate' or 'mscale' for YaRN, "
            "which llama.cpp does not compute for this family"
        )
    for key, known in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if found.get(key) not in (None, known):
            raise PackError(
                f"{settings.label}: config.json gives '{key}' as {found[key]!r:.40}; llama.cpp "
                f"computes YaRN with {known:g} for this family"
            )
    if found.get("attention_factor") is not None:
        # llama.cpp multiplies its own 0.1·ln(factor) + 1 by this number.
        own = 0.1 * log(float(found["factor"])) + 1.0
        values["rope.scaling.attn_factor"] = f32(float(found["attention_factor"]) / own)
    return values
