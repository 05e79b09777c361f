"""A base whose layers are stacked anew, as PEFT's ``layer_replication`` asks before adapting it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mergekit_lite.checkpoint.layers import layer_count_keys, main_stack, map_layers
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, TensorReader, TensorSpec
from mergekit_lite.dtypes import DType
from mergekit_lite.errors import PackError

__all__ = ["ReplicatedCheckpoint"]


class ReplicatedCheckpoint(Checkpoint):
    """The layers ``[first, last)`` of every range, one range after the other.

    Raises:
        PackError: A range goes beyond the layers, or the stack of layers is not plain.
    """

    def __init__(self, base: Checkpoint, ranges: Sequence[tuple[int, int]]) -> None:
        self.label = base.label
        self.folder = base.folder
        self._base = base
        layers = map_layers(base.names(), base.config)
        prefix = main_stack(layers, base.label)
        count = layers.counts[prefix]
        picked = [layer for first, last in ranges for layer in range(first, last)]
        if max(picked) >= count:
            raise PackError(
                f"the adapter replicates layer {max(picked)}, while {base.label} has {count}",
                "Check that this is the base that the adapter was trained on.",
            )
        self._origin: dict[str, str] = {}
        for name in base.names():
            place = layers.layers.get(name)
            if place is None or place.prefix != prefix:
                self._origin[name] = name
                continue
            for new, old in enumerate(picked):
                if old == place.index:
                    self._origin[f"{prefix}{new}{place.rest}"] = name
        self.config = _restacked(base.config, count, picked)

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self._origin)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self._base.spec(self._origin[name])

    def kept_dtype(self, name: str) -> DType:
        """What the base keeps."""
        return self._base.kept_dtype(self._origin[name])

    def file_of(self, name: str) -> str | None:
        """The base's file."""
        return self._base.file_of(self._origin[name])

    def open(self, name: str) -> TensorReader:
        """Open the tensor that it is a replica of."""
        return self._base.open(self._origin[name])

    def prefetch(self, name: str) -> None:
        """Ask for the base's bytes."""
        self._base.prefetch(self._origin[name])

    def fingerprint(self) -> str:
        """Those of the base."""
        return self._base.fingerprint()

    def input_files(self) -> list[InputFile]:
        """Those of the base."""
        return self._base.input_files()

    def close(self) -> None:
        """Close the base."""
        self._base.close()


def _restacked(config: Any, count: int, picked: Sequence[int]) -> dict[str, Any]:
    """A config with the new number of layers, and its lists per layer picked anew."""
    new: dict[str, Any] = json.loads(json.dumps(config))
    target = new
    if not layer_count_keys(new) and isinstance(new.get("text_config"), dict):
        target = new["text_config"]
    for key in layer_count_keys(target):
        if target[key] == count:
            target[key] = len(picked)
    for name, value in target.items():
        if isinstance(value, list) and len(value) == count and count > 1:
            target[name] = [value[layer] for layer in picked]
    return new
