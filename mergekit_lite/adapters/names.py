"""Where the parameters of a model lie in the files of its checkpoint.

Most files name tensors as the model names its parameters. Some were saved from the bare model and
lack a prefix, some are renamed or stacked while they are loaded. transformers knows how, and is
asked only where a parameter is not found by its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from mergekit_lite.adapters.architecture import build_empty
from mergekit_lite.adapters.lora import Part
from mergekit_lite.checkpoint.protocol import Checkpoint

__all__ = ["ModelNames"]


class ModelNames:
    """Looks up the parameters of one model."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._names = frozenset(base.names())

    def find(self, parameter: str) -> tuple[Part, ...]:
        """The places of a parameter.

        Empty if the files have none, or hold it in a form that is more than a stack of experts.
        """
        if parameter in self._names:
            return (Part(parameter),)
        return self._loaded.get(parameter, ())

    @cached_property
    def model(self) -> Any:
        """The model without weights."""
        return build_empty(self._base)

    def input_embedding(self) -> str | None:
        """Path of the module that embeds tokens; None if the model has none."""
        return self._path_of(self.model.get_input_embeddings())

    def output_embedding(self) -> str | None:
        """Path of the module that gives the logits; None if the model has none."""
        return self._path_of(self.model.get_output_embeddings())

    def _path_of(self, wanted: Any) -> str | None:
        paths = (path for path, module in self.model.named_modules() if module is wanted)
        return None if wanted is None else next(paths, None)

    @cached_property
    def _loaded(self) -> dict[str, tuple[Part, ...]]:
        """Places of all parameters, by what transformers would do to load them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        known = self.model.state_dict()
        plain: dict[str, tuple[Part, ...]] = {}
        stacks: dict[str, dict[str, list[str]]] = {}
        for name in self._base.names():
            parameter, pattern = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, known
            )
            if pattern is None:
                plain[parameter] = (Part(name),)
            else:
                stacks.setdefault(parameter, {}).setdefault(pattern, []).append(name)
        operations = {p: c.operations for c in converters for p in c.source_patterns}
        orders = {p: c.source_patterns for c in converters for p in c.source_patterns}
        for parameter, sources in stacks.items():
            pattern = next(iter(sources))
            if _stacks_experts(operations[pattern]):
                groups = [sources[p] for p in orders[pattern] if p in sources]
                plain[parameter] = tuple(self._stacked(groups))
        return plain

    def _stacked(self, groups: Sequence[list[str]]) -> Iterator[Part]:
        """Parts of a parameter ``(experts, rows, columns)``: one file tensor each.

        Args:
            groups: Names of the files' tensors, in the order in which their rows are joined.
        """
        start = 0
        for names in groups:
            ordered = sorted(names, key=_numbers)
            rows = self._base.spec(ordered[0]).shape[0]
            for expert, name in enumerate(ordered):
                part = (start, start + rows) if len(groups) > 1 else None
                yield Part(name, expert, part)
            start += rows


def _stacks_experts(operations: Sequence[Any]) -> bool:
    """Whether a conversion stacks experts and joins the rows of their matrices, no more."""
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in operations]
    return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
