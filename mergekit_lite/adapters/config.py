"""adapter_config.json: what kind of adapter, for which base, and what changes its arithmetic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.safetensors import load_json
from mergekit_lite.errors import PackError

__all__ = ["CONFIG_NAME", "AdapterConfig", "LoraSettings", "read_adapter_config"]

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter says of itself.

    Attributes:
        label: How the user named the adapter.
        kind: PEFT's name for its type, in capitals, for example ``LORA``.
        base: Model that it was trained on, as its author named it; None if it does not say.
        revision: Revision of that model; None if it does not say.
        data: The whole file.
    """

    label: str
    kind: str
    base: str | None
    revision: str | None
    data: Mapping[str, Any]


def read_adapter_config(folder: Path, label: str) -> AdapterConfig:
    """Read the config of an adapter.

    Raises:
        PackError: It is not there, is no JSON object, or does not say what type it is.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise PackError(
            f"{label}: holds no {CONFIG_NAME}", "Give the folder that the adapter was saved to."
        )
    data: Mapping[str, Any] = load_json(path)
    kind = data.get("peft_type")
    if not isinstance(kind, str) or not kind:
        raise PackError(
            f"{path}: does not say what type of adapter this is (no 'peft_type')",
            "Restore the file from where the adapter was trained, or download it again.",
        )
    return AdapterConfig(
        label=label,
        kind=kind.upper(),
        base=_text(data, "base_model_name_or_path", path) or None,
        revision=_text(data, "revision", path) or None,
        data=data,
    )


def _text(data: Mapping[str, Any], key: str, path: Path) -> str:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise PackError(f"{path}: '{key}' is not text ({value!r:.40})", _RESTORE)
    return value or ""


_RESTORE = "Restore the file from where the adapter was trained."


@dataclass(frozen=True)
class LoraSettings:
    """The keys of a LoRA config that change what is added to the base.

    Attributes:
        rank: ``r``.
        alpha: ``lora_alpha``.
        rank_pattern: Ranks by regular expression over the end of a module's path.
        alpha_pattern: Alphas, likewise.
        rank_stabilized: Whether the scale is ``alpha / sqrt(r)`` (arXiv 2312.03732).
        dora: Whether the rows of the result have trained lengths (arXiv 2402.09353).
        initial: How the factors were initialised; some ways change the base as well.
        replication: Ranges of the base's layers that the adapted model is stacked from.
        tokens: Rows of embeddings that were trained: of any, or by the end of a module's path.
        ties: Whether the adapter of the input embedding holds for a tied output embedding too.
        parameters: Ends of the paths of parameters, not modules, that are adapted.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
    initial: str
    replication: tuple[tuple[int, int], ...]
    tokens: Mapping[str, tuple[int, ...]]
    ties: bool
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, config: AdapterConfig) -> LoraSettings:
        """Read them from a config.

        Raises:
            PackError: A value is not of the type that it must have.
        """
        read = _Reader(config)
        initial = config.data.get("init_lora_weights")
        return cls(
            rank=read.whole("r", 8),
            alpha=read.number("lora_alpha", 8),
            rank_pattern=read.pattern("rank_pattern", whole=True),
            alpha_pattern=read.pattern("alpha_pattern", whole=False),
            rank_stabilized=read.flag("use_rslora"),
            dora=read.flag("use_dora"),
            initial=initial.lower() if isinstance(initial, str) else "",
            replication=read.ranges("layer_replication"),
            tokens=read.tokens("trainable_token_indices"),
            ties=read.flag("ensure_weight_tying"),
            parameters=read.words("target_parameters"),
        )

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module."""
        return int(_matching(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """The alpha that the config gives a module."""
        return float(_matching(self.alpha_pattern, module, self.alpha))

    def scale_of(self, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alpha_of(module)
        return alpha / sqrt(rank) if self.rank_stabilized else alpha / rank

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of a module's weight that were trained; None where none were."""
        for end, indices in self.tokens.items():
            if not end or module == end or module.endswith("." + end):
                return indices
        return None


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module: a regular expression over its end."""
    for expression, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({expression})", module):
            return value
    return default


class _Reader:
    """Typed reading of a config; every mistake names the file's label and the key."""

    def __init__(self, config: AdapterConfig) -> None:
        self._data = config.data
        self._label = config.label

    def whole(self, key: str, default: int) -> int:
        value = self._data.get(key, default)
        if not _is_rank(value):
            self._fail(key, value, "a positive whole number")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self._data.get(key, default)
        if not _is_number(value):
            self._fail(key, value, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._data.get(key)
        if not isinstance(value, bool | None):
            self._fail(key, value, "true or false")
        return bool(value)

    def words(self, key: str) -> tuple[str, ...]:
        value = self._data.get(key) or []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            self._fail(key, value, "a list of names")
        return tuple(value)

    def pattern(self, key: str, *, whole: bool) -> dict[str, Any]:
        value = self._data.get(key) or {}
        valid = _is_rank if whole else _is_number
        if not isinstance(value, dict) or not all(valid(number) for number in value.values()):
            self._fail(key, value, "numbers by module")
        for expression in value:
            try:
                re.compile(rf"(.*\.)?({expression})")
            except re.error as error:
                self._fail(key, expression, f"a regular expression ({error})")
        return dict(value)

    def ranges(self, key: str) -> tuple[tuple[int, int], ...]:
        value = self._data.get(key) or []
        fits = isinstance(value, list) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
            and 0 <= pair[0] < pair[1]
            for pair in value
        )
        if not fits:
            self._fail(key, value, "a list of [first, one past the last]")
        return tuple((a, b) for a, b in value)

    def tokens(self, key: str) -> dict[str, tuple[int, ...]]:
        value = self._data.get(key) or {}
        if isinstance(value, list):
            value = {"": value} if value else {}
        fits = isinstance(value, dict) and all(
            isinstance(indices, list)
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in indices)
            for indices in value.values()
        )
        if not fits:
            self._fail(key, value, "a list of token indices, or such lists by module")
        return {module: tuple(indices) for module, indices in value.items()}

    def _fail(self, key: str, value: object, expected: str) -> None:
        raise PackError(
            f"{self._label}: {CONFIG_NAME} gives '{key}' as {value!r:.60}; expected {expected}",
            _RESTORE,
        )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 20


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
