"""An adapter at a glance, from its header and small files alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_lite.adapters.config import AdapterConfig, LoraSettings, read_adapter_config
from mergekit_lite.adapters.contents import PREFIX, LoraModule, sort_tensors
from mergekit_lite.adapters.types import MERGED, REFUSED, check_mergeable
from mergekit_lite.analyse.inspect import count_dtypes, dtypes_data
from mergekit_lite.checkpoint.card import read_card
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError

__all__ = ["AdapterView", "RankGroup", "adapter_data", "view_adapter"]


@dataclass(frozen=True)
class RankGroup:
    """Modules of one kind that are adapted alike.

    Attributes:
        kind: Last part of their paths.
        modules: How many there are.
        rank: Their rank, as their factors have it; None of an adapter without factors.
        alpha: As the config gives it; None where it cannot be known.
        scale: What the product of their factors is multiplied by; None likewise.
    """

    kind: str
    modules: int
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class AdapterView:
    """What an adapter is.

    Attributes:
        name: As the user named it.
        commit: Commit on the Hub; None for what lies on this disk.
        adapter_type: Its type, as PEFT calls it.
        merges: How pack merges it, or why it cannot.
        base: Base that it was trained on; None if it does not say.
        revision: Revision of that base.
        parameters: Number of trained elements.
        dtypes: Elements and bytes by type.
        size: Bytes of all tensors.
        tensors: Number of tensors.
        modules: Adapted modules by kind.
        options: Keys of its config that change its arithmetic and are not at their usual value.
        whole: Tensors that it carries whole.
        task: Its task; None if it does not say.
        peft: Version of PEFT that wrote it; None if it does not say.
        licence: As its card says, or the name of a licence file.
        notes: What does not fit together.
    """

    name: str
    commit: str | None
    adapter_type: str
    merges: str
    base: str | None
    revision: str | None
    parameters: int
    dtypes: Mapping[str, tuple[int, int]]
    size: int
    tensors: int
    modules: tuple[RankGroup, ...]
    options: Mapping[str, Any]
    whole: tuple[str, ...]
    task: str | None
    peft: str | None
    licence: str | None
    notes: tuple[str, ...] = ()


def view_adapter(source: Source) -> AdapterView:
    """Look at an adapter's header, config and card."""
    config = read_adapter_config(source.path, source.reference)
    tensors = source.checkpoint
    dtypes = count_dtypes(tensors)
    card = read_card(source.path)
    notes = [*source.notes, *card.notes]
    lora = config.kind == "LORA"
    contents = sort_tensors(tensors)
    copies = sum(tensors.spec(name).elements for name in contents.copies.values()) if lora else 0
    if copies:
        notes.append(f"{len(contents.copies)} of its tensors are copies of the base's weights")
    return AdapterView(
        name=source.reference,
        commit=source.revision,
        adapter_type=config.kind,
        merges=_merges(config),
        base=config.base,
        revision=config.revision,
        parameters=sum(count for count, _ in dtypes.values()) - copies,
        dtypes=dtypes,
        size=sum(size for _, size in dtypes.values()),
        tensors=len(tensors.names()),
        modules=_factored(config, tensors, notes) if lora else _named(config, tensors),
        options=_options(config),
        whole=tuple(sorted(contents.whole)) if lora else (),
        task=_text(config, "task_type"),
        peft=_text(config, "peft_version"),
        licence=card.licence,
        notes=tuple(notes),
    )


def adapter_data(view: AdapterView) -> dict[str, Any]:
    """A view as data for JSON; keys do not change."""
    return {"kind": "adapter", **asdict(view), "dtypes": dtypes_data(view.dtypes)}


def _text(config: AdapterConfig, key: str) -> str | None:
    value = config.data.get(key)
    return value if isinstance(value, str) and value else None


def _merges(config: AdapterConfig) -> str:
    """How it is merged, as `mergekit_lite.adapters.types` has it, or why it is not."""
    try:
        check_mergeable(config)
    except PackError as error:
        why = REFUSED.get(config.kind) or error.message.removeprefix(f"{config.label}: ")
        return f"no: {why}"
    return MERGED[config.kind]


def _factored(
    config: AdapterConfig, tensors: Checkpoint, notes: list[str]
) -> tuple[RankGroup, ...]:
    """LoRA: ranks as the factors have them, checked against what the config promises."""
    try:
        settings: LoraSettings | None = LoraSettings.of(config)
    except PackError as error:
        settings = None
        notes.append(error.message)
    groups: Counter[tuple[str, int, float | None, float | None]] = Counter()
    wrong = []
    for module in sort_tensors(tensors).modules:
        rank, problem = _rank(module, tensors, settings)
        wrong += [f"{module.path}: {problem}"] if problem else []
        alpha = settings.alpha_of(module.path) if settings else None
        scale = settings.scale_of(module.path) if settings else None
        groups[module.path.rpartition(".")[2], rank, alpha, scale] += 1
    notes += wrong[:3]
    if len(wrong) > 3:
        notes.append(f"… and {len(wrong) - 3} more modules whose factors do not fit")
    ordered = sorted(groups.items(), key=lambda item: item[0][:2])
    return tuple(RankGroup(k[0], count, *k[1:]) for k, count in ordered)


def _rank(
    module: LoraModule, tensors: Checkpoint, settings: LoraSettings | None
) -> tuple[int, str]:
    """The rank of a module's factors, and what is wrong with them.

    A is ``(rank, in, …)`` and B ``(out, rank, …)``; of a parameter that holds several experts, A
    is ``(experts·rank, in)``.
    """
    shapes = [tensors.spec(module.parts[p]).shape for p in module.factors if p in module.parts]
    if len(shapes) < 2:
        missing = [part for part in module.factors if part not in module.parts]
        return 0, f"has no {missing[0]}"
    if len(shapes[0]) < 2 or len(shapes[1]) < 2:
        return 0, f"factors of shapes {list(shapes[0])} and {list(shapes[1])} are no matrices"
    stored = shapes[0][0]
    if stored != shapes[1][1]:
        return stored, f"rank {stored} in {module.factors[0]}, {shapes[1][1]} in the other factor"
    promised = settings.rank_of(module.path) if settings else stored
    if settings and (settings.parameters or module.depth) and stored % promised == 0:
        return promised, ""
    return stored, "" if stored == promised else f"rank {stored}, its config says {promised}"


def _named(config: AdapterConfig, tensors: Checkpoint) -> tuple[RankGroup, ...]:
    """Other types: the modules that the config targets, found in the tensors' names."""
    targets = config.data.get("target_modules")
    kinds: Counter[str] = Counter()
    for path in {
        found
        for name in tensors.names()
        if (found := _target(name.removeprefix(PREFIX), targets)) is not None
    }:
        kinds[path.rpartition(".")[2]] += 1
    return tuple(RankGroup(kind, count) for kind, count in sorted(kinds.items()))


def _target(name: str, targets: object) -> str | None:
    """The path of the targeted module that a tensor belongs to."""
    parts = name.split(".")
    paths = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    if isinstance(targets, list):
        ends = tuple(t for t in targets if isinstance(t, str))
        return next(
            (p for p in paths if p in ends or p.endswith(tuple("." + e for e in ends))), None
        )
    if isinstance(targets, str):
        try:
            expression = re.compile(targets)
        except re.error:
            return None
        return next((p for p in paths if expression.fullmatch(p)), None)
    return None


_ARITHMETIC = (
    "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "lora_bias",
    "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters",
    "layers_to_transform", "init_lora_weights", "alora_invocation_tokens", "use_bdlora",
    "kasa_config", "arrow_config", "monteclora_config", "use_qalora", "ensure_weight_tying",
    "decompose_both", "decompose_factor", "rank_dropout_scale", "oft_block_size", "coft",
    "block_share", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "n_frequency",
    "scaling", "projection_prng_key", "save_projection", "d_initial", "num_vectors",
    "vector_length", "topk", "block_size", "init_r", "target_r", "feedforward_modules",
    "num_virtual_tokens", "token_dim",
)  # fmt: skip
_TOLD_BY_MODULE = ("r", "lora_alpha")
_USUAL: tuple[object, ...] = (None, False, "none", [], {})


def _options(config: AdapterConfig) -> dict[str, Any]:
    """Keys that change the arithmetic and are not at their usual value."""
    return dict(_unusual(config))


def _unusual(config: AdapterConfig) -> Iterable[tuple[str, Any]]:
    for key in _ARITHMETIC:
        value = config.data.get(key)
        usual = any(value == each and type(value) is type(each) for each in _USUAL)
        by_default = key == "init_lora_weights" and value is True
        by_module = config.kind == "LORA" and key in _TOLD_BY_MODULE
        if not usual and not by_default and not by_module:
            yield key, value
