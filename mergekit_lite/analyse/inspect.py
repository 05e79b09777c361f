"""A checkpoint at a glance, from headers and small files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_lite.analyse.tokenizer import TokenizerView, view_tokenizer
from mergekit_lite.checkpoint.card import read_card
from mergekit_lite.checkpoint.layers import map_layers
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.checkpoint.quantized import is_packed

__all__ = ["ModelView", "count_dtypes", "list_tensors", "model_data", "view_model"]

_DIMENSIONS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "intermediate": ("intermediate_size", "n_inner", "d_ff"),
    "heads": ("num_attention_heads", "n_head"),
    "key-value heads": ("num_key_value_heads",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts per token": ("num_experts_per_tok",),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions"),
}


@dataclass(frozen=True)
class ModelView:
    """What a checkpoint is.

    Attributes:
        name: As the user named it.
        revision: Commit on the Hub; None for what lies on this disk.
        architecture: From its config; None for a bare file.
        layers: Number of layers of the main stack; None if that is not plain.
        dimensions: Numbers of its config, by what they count.
        parameters: Number of elements of floating-point type.
        dtypes: Elements and bytes by type.
        size: Bytes of all tensors.
        files: Names of the weight files.
        tensors: Number of tensors.
        tied: Whether its config ties input and output embeddings; None if it does not say.
        quantized: Quantization method with bits and group; None if it is not quantized.
        tokenizer: What its tokenizer is.
        licence: As its card says, or the name of a licence file; None if there is neither.
        base: Models that it was made from, as its card says.
        metadata: What its files say of themselves.
        notes: What a reader should know.
    """

    name: str
    revision: str | None
    architecture: str | None
    layers: int | None
    dimensions: Mapping[str, int]
    parameters: int
    dtypes: Mapping[str, tuple[int, int]]
    size: int
    files: tuple[str, ...]
    tensors: int
    tied: bool | None
    quantized: str | None
    tokenizer: TokenizerView
    licence: str | None
    base: tuple[str, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def view_model(source: Source) -> ModelView:
    """Look at a checkpoint's headers, config, tokenizer and card."""
    checkpoint = source.checkpoint
    names = checkpoint.names()
    config = _text_config(checkpoint.config)
    layers = map_layers(names, checkpoint.config)
    dtypes = count_dtypes(checkpoint)
    card, tokenizer = read_card(checkpoint.folder), view_tokenizer(checkpoint.folder)
    dimensions, quantized = _dimensions(config), _quantized(checkpoint.config)
    tied = config.get("tie_word_embeddings")
    return ModelView(
        name=source.reference,
        revision=source.revision,
        architecture=_architecture(checkpoint.config),
        layers=layers.counts[layers.main] if layers.main else None,
        dimensions=dimensions,
        parameters=sum(
            spec.elements for spec in map(checkpoint.spec, names) if spec.dtype.is_float
        ),
        dtypes=dtypes,
        size=sum(size for _, size in dtypes.values()),
        files=tuple(sorted({file for n in names if (file := checkpoint.file_of(n))})),
        tensors=len(names),
        tied=tied if isinstance(tied, bool) else None,
        quantized=quantized,
        tokenizer=tokenizer,
        licence=card.licence,
        base=card.base,
        metadata=checkpoint.metadata(),
        notes=(
            *source.notes, *card.notes, *tokenizer.notes,
            *_doubts(dimensions, tokenizer, is_packed(checkpoint), checkpoint.config),
        ),
    )  # fmt: skip


def model_data(view: ModelView) -> dict[str, Any]:
    """A view as data for JSON; keys do not change."""
    return {"kind": "model", **asdict(view), "dtypes": dtypes_data(view.dtypes)}


def dtypes_data(dtypes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Elements and bytes by type, with their names."""
    return {name: {"elements": count, "bytes": size} for name, (count, size) in dtypes.items()}


def list_tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Every tensor as its files hold it: name, dtype, shape, bytes, file (None: computed)."""
    found = []
    for name in checkpoint.names():
        kind, size = checkpoint.stored(name)
        found.append(
            {
                "name": name,
                "dtype": kind,
                "shape": list(checkpoint.spec(name).shape),
                "bytes": size,
                "file": checkpoint.file_of(name),
            }
        )
    return found


def count_dtypes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Elements and bytes by type, the type of most bytes first."""
    found: dict[str, tuple[int, int]] = {}
    for name in checkpoint.names():
        kind, stored = checkpoint.stored(name)
        count, size = found.get(kind, (0, 0))
        found[kind] = count + checkpoint.spec(name).elements, size + stored
    return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def _architecture(config: Mapping[str, object]) -> str | None:
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    name = next((n for n in names if isinstance(n, str) and n), config.get("model_type"))
    return name if isinstance(name, str) and name else None


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _dimensions(config: Mapping[str, object]) -> dict[str, int]:
    found = {}
    for what, keys in _DIMENSIONS.items():
        value = next((value for key in keys if type(value := config.get(key)) is int), None)
        if value is not None:
            found[what] = value
    return found


def _quantized(config: Mapping[str, object]) -> str | None:
    """Method, bits and group size, as far as the config states them."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return None
    parts = [str(stated.get("quant_method") or "unnamed method")]
    bits, group = stated.get("bits", stated.get("w_bit")), stated.get("group_size")
    parts += [f"{bits} bits"] if type(bits) is int else []
    parts += [f"groups of {group}"] if type(group) is int and group > 0 else []
    parts += ["4 bits"] if stated.get("load_in_4bit") is True else []
    return ", ".join(parts)


def _doubts(
    dimensions: Mapping[str, int],
    tokenizer: TokenizerView,
    packed: bool,
    config: Mapping[str, object],
) -> Iterable[str]:
    """What does not fit together, or is not what it seems."""
    rows = dimensions.get("vocabulary")
    if rows is not None and tokenizer.tokens is not None and tokenizer.tokens > rows:
        yield f"the tokenizer has {tokenizer.tokens} tokens, the model embeds {rows}"
    if packed:
        yield "quantized weights are packed: elements are no parameters of the model"
    if config.get("auto_map"):
        yield "the config names Python code of the model's own (auto_map); pack never runs it"
