"""A checkpoint or an adapter at a glance, from headers and small files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.adapters.config import AdapterConfig, LoraSettings, read_adapter_config
from mergekit_lite.adapters.contents import sort_tensors
from mergekit_lite.adapters.types import MERGED, REFUSED
from mergekit_lite.checkpoint.layers import map_layers
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.checkpoint.safetensors import load_json
from mergekit_lite.errors import PackError
from mergekit_lite.tokenizer.vocabulary import read_vocabulary

__all__ = ["AdapterView", "ModelView", "RankGroup", "as_data", "view_adapter", "view_model"]

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
        architecture: From its config; None for a bare file.
        layers: Number of layers of the main stack; None if that is not plain.
        dimensions: Numbers of its config, by what they count.
        parameters: Number of elements of floating-point type.
        dtypes: Elements and bytes by type.
        size: Bytes of all tensors.
        files: Names of the weight files.
        tensors: Number of tensors.
        tied: Whether its config ties input and output embeddings.
        quantized: Quantization method; None if it is not quantized.
        tokenizer: What its tokenizer is; None if it has none.
        chat_template: Whether it has one.
        licence: As its card says; None if it does not.
        base: Models that it was made from, as its card says.
        notes: What a reader should know.
    """

    name: str
    architecture: str | None
    layers: int | None
    dimensions: Mapping[str, int]
    parameters: int
    dtypes: Mapping[str, tuple[int, int]]
    size: int
    files: tuple[str, ...]
    tensors: int
    tied: bool
    quantized: str | None
    tokenizer: str | None
    chat_template: bool
    licence: str | None
    base: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankGroup:
    """Modules of one kind that are adapted alike.

    Attributes:
        kind: Last part of their paths.
        modules: How many there are.
        rank: Their rank.
        scale: What the product of their factors is multiplied by.
    """

    kind: str
    modules: int
    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterView:
    """What an adapter is.

    Attributes:
        name: As the user named it.
        kind: Its type, as PEFT calls it.
        merges: How pack merges it, or why it cannot.
        base: Base that it was trained on; None if it does not say.
        revision: Revision of that base.
        parameters: Number of trained elements.
        dtypes: Elements and bytes by type.
        size: Bytes of all tensors.
        tensors: Number of tensors.
        ranks: Of LoRA: its modules.
        options: Keys of its config that change its arithmetic.
        whole: Tensors that it carries whole.
        task: Its task; None if it does not say.
        licence: As its card says.
    """

    name: str
    kind: str
    merges: str
    base: str | None
    revision: str | None
    parameters: int
    dtypes: Mapping[str, tuple[int, int]]
    size: int
    tensors: int
    ranks: tuple[RankGroup, ...]
    options: Mapping[str, Any]
    whole: tuple[str, ...]
    task: str | None
    licence: str | None


def view_model(source: Source) -> ModelView:
    """Look at a checkpoint's headers, config, tokenizer and card."""
    checkpoint = source.checkpoint
    config = _text_config(checkpoint.config)
    layers = map_layers(checkpoint.names(), checkpoint.config)
    dtypes = _dtypes(checkpoint)
    quantization = checkpoint.config.get("quantization_config")
    card = _card(checkpoint.folder)
    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return ModelView(
        name=source.reference,
        architecture=str(name or checkpoint.config.get("model_type") or "") or None,
        layers=layers.counts[layers.main] if layers.main else None,
        dimensions=_dimensions(config),
        parameters=sum(
            spec.elements
            for spec in map(checkpoint.spec, checkpoint.names())
            if spec.dtype.is_float
        ),
        dtypes=dtypes,
        size=sum(size for _, size in dtypes.values()),
        files=_files(source),
        tensors=len(checkpoint.names()),
        tied=checkpoint.config.get("tie_word_embeddings") is True,
        quantized=str(quantization.get("quant_method", "unnamed"))
        if isinstance(quantization, dict)
        else None,
        tokenizer=_tokenizer(checkpoint.folder),
        chat_template=_has_chat_template(checkpoint.folder),
        licence=_licence(checkpoint.folder, card),
        base=_list(card.get("base_model")),
        notes=source.notes,
    )


def view_adapter(source: Source) -> AdapterView:
    """Look at an adapter's header, config and card."""
    config = read_adapter_config(source.path, source.reference)
    tensors = source.checkpoint
    dtypes = _dtypes(tensors)
    card = _card(source.path)
    lora = config.kind == "LORA"
    contents = sort_tensors(tensors)
    task = config.data.get("task_type")
    return AdapterView(
        name=source.reference,
        kind=config.kind,
        merges=MERGED.get(config.kind) or f"no: {REFUSED.get(config.kind, 'an unknown type')}",
        base=config.base,
        revision=config.revision,
        parameters=sum(count for count, _ in dtypes.values()),
        dtypes=dtypes,
        size=sum(size for _, size in dtypes.values()),
        tensors=len(tensors.names()),
        ranks=_ranks(config, tensors) if lora else (),
        options=_options(config),
        whole=tuple(sorted(contents.whole)) if lora else (),
        task=task if isinstance(task, str) else None,
        licence=_licence(source.path, card),
    )


def as_data(view: ModelView | AdapterView) -> dict[str, Any]:
    """A view as data for JSON."""
    data = asdict(view)
    data["dtypes"] = {
        name: {"elements": count, "bytes": size} for name, (count, size) in view.dtypes.items()
    }
    return data


def _dtypes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name in checkpoint.names():
        elements, dtype = checkpoint.spec(name).elements, checkpoint.kept_dtype(name)
        count, size = found.get(dtype.name, (0, 0))
        found[dtype.name] = count + elements, size + elements * dtype.itemsize
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _dimensions(config: Mapping[str, object]) -> dict[str, int]:
    found = {}
    for what, keys in _DIMENSIONS.items():
        value = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
        if isinstance(value, int):
            found[what] = value
    return found


def _files(source: Source) -> tuple[str, ...]:
    lines = source.checkpoint.fingerprint().splitlines()
    names = [line.split(" ")[0] for line in lines if line]
    return tuple(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth")))


def _tokenizer(folder: Path | None) -> str | None:
    if folder is None:
        return None
    vocabulary = read_vocabulary(folder)
    kind = ""
    if (folder / "tokenizer.json").is_file():
        model = load_json(folder / "tokenizer.json").get("model")
        kind = str(model.get("type", "")) if isinstance(model, dict) else ""
    elif (folder / "tokenizer.model").is_file():
        kind = "SentencePiece"
    elif vocabulary is None:
        return None
    count = f", {len(vocabulary)} tokens" if vocabulary else ""
    return f"{kind or 'vocabulary'}{count}"


def _has_chat_template(folder: Path | None) -> bool:
    if folder is None:
        return False
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(load_json(config).get("chat_template"))


def _card(folder: Path | None) -> Mapping[str, Any]:
    """The front matter of a model card; empty without one."""
    path = None if folder is None else folder / "README.md"
    if path is None or not path.is_file():
        return {}
    text = path.read_text("utf-8", errors="replace")[: 1 << 16]
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if match is None:
        return {}
    import yaml

    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _licence(folder: Path | None, card: Mapping[str, Any]) -> str | None:
    stated = card.get("license")
    if stated == "other" and card.get("license_name"):
        stated = card["license_name"]
    if isinstance(stated, str):
        return stated
    texts = [] if folder is None else sorted(p.name for p in folder.glob("LICENSE*"))
    return f"see {texts[0]}" if texts else None


def _list(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, str))


def _ranks(config: AdapterConfig, tensors: Checkpoint) -> tuple[RankGroup, ...]:
    settings = LoraSettings.of(config)
    groups: dict[tuple[str, int, float], int] = {}
    for module in sort_tensors(tensors).modules:
        first = module.parts.get(module.factors[0])
        shape = tensors.spec(first).shape if first else (0,)
        key = module.path.rpartition(".")[2], int(shape[0]), settings.scale_of(module.path)
        groups[key] = groups.get(key, 0) + 1
    return tuple(
        RankGroup(kind, count, rank, scale) for (kind, rank, scale), count in sorted(groups.items())
    )


_ARITHMETIC = (
    "use_rslora", "use_dora", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save",
    "trainable_token_indices", "layer_replication", "target_parameters", "layers_to_transform",
    "init_lora_weights", "alora_invocation_tokens", "use_bdlora", "kasa_config", "arrow_config",
    "monteclora_config", "use_qalora", "ensure_weight_tying",
)  # fmt: skip


def _options(config: AdapterConfig) -> dict[str, Any]:
    """Keys that are not at their usual value."""
    usual: tuple[object, ...] = (None, False, "none", True, [], {})
    return {
        key: config.data[key]
        for key in _ARITHMETIC
        if key in config.data
        and (config.data[key] not in usual or (config.data[key] is True and key != _INIT))
    }


_INIT = "init_lora_weights"


def refuse_gguf(path: Path) -> None:
    """Say that GGUF is not read yet, instead of that it is no safetensors file.

    Raises:
        PackError: The file begins as GGUF does.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                raise PackError(
                    f"{path}: is a GGUF file, which pack does not read yet",
                    "Inspect the model that it was made from.",
                )
