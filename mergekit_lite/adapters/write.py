"""A new adapter as PEFT saves one: config, factors in one file, and the lock of what made it.

Every module's scale is 1 (its alpha equals its rank), so that no program has to know more than
``lora_alpha / r`` to apply it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.adapters.config import CONFIG_NAME
from mergekit_lite.checkpoint.header import write_header
from mergekit_lite.dtypes import DTYPES, Array, DType
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.cast import encode

__all__ = ["WEIGHTS_NAME", "BaseName", "NewAdapter", "NewModule"]

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class BaseName:
    """The base that an adapter is for, as its config names it."""

    name: str | None
    revision: str | None


@dataclass(frozen=True)
class NewModule:
    """One adapted module.

    Attributes:
        path: Its path in the model.
        a: ``(rank, in)``.
        b: ``(out, rank)``.
        embedding: Whether it is an embedding: ``in`` is the vocabulary, ``out`` the width.
        bias: New bias of the module, ``(out,)``; None where it is the base's.
    """

    path: str
    a: Array
    b: Array
    embedding: bool = False
    bias: Array | None = None


@dataclass
class NewAdapter:
    """What is to be written.

    Attributes:
        base: The base that it is for.
        modules: Adapted modules.
        whole: Tensors that are carried whole, by path of the parameter.
        stored_as: Types of those that are not stored as the factors are, by path.
        others: Paths of the modules of the base that are not adapted but could be; None where
            the base is not known.
        fan_in_fan_out: Whether the adapted layers are Conv1D.
        task: PEFT's ``task_type``; None if not known.
        ties: Whether what is said of the input embedding holds for the output embedding too.
        dtype: Type of the factors.
    """

    base: BaseName
    modules: list[NewModule] = field(default_factory=list)
    whole: dict[str, Array] = field(default_factory=dict)
    stored_as: dict[str, DType] = field(default_factory=dict)
    others: Sequence[str] | None = None
    fan_in_fan_out: bool = False
    task: str | None = None
    ties: bool = False
    dtype: DType = DTYPES["F32"]

    def tensors(self) -> dict[str, Array]:
        """All tensors under PEFT's names, sorted."""
        found: dict[str, Array] = {}
        for module in self.modules:
            path = _PREFIX + module.path
            if module.embedding:
                found[f"{path}.lora_embedding_A"] = module.a
                found[f"{path}.lora_embedding_B"] = module.b
            else:
                found[f"{path}.lora_A.weight"] = module.a
                found[f"{path}.lora_B.weight"] = module.b
            if module.bias is not None:
                found[f"{path}.base_layer.bias"] = module.bias
        found |= {_PREFIX + name: tensor for name, tensor in self.whole.items()}
        return dict(sorted(found.items()))

    def config(self) -> dict[str, Any]:
        """Contents of adapter_config.json."""
        ranks = {module.path: int(module.a.shape[0]) for module in self.modules}
        common = max(ranks.values(), key=lambda r: (list(ranks.values()).count(r), r), default=1)
        special = {path: rank for path, rank in sorted(ranks.items()) if rank != common}
        saved = sorted({name.rpartition(".")[0] for name in self.whole})
        return {
            "alpha_pattern": special,
            "base_model_name_or_path": self.base.name,
            **({"ensure_weight_tying": True} if self.ties else {}),
            "bias": "lora_only" if any(m.bias is not None for m in self.modules) else "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": common,
            "lora_dropout": 0.0,
            "modules_to_save": saved or None,
            "peft_type": "LORA",
            "r": common,
            "rank_pattern": special,
            "revision": self.base.revision,
            "target_modules": self._targets(),
            "task_type": self.task,
            "use_dora": False,
            "use_rslora": False,
        }

    def _targets(self) -> list[str]:
        """Ends of paths if they mean these modules and no others, else whole paths."""
        paths = [module.path for module in self.modules]
        ends = {path.rpartition(".")[2] for path in paths}
        if self.others is not None and not any(
            path.rpartition(".")[2] in ends for path in self.others
        ):
            return sorted(ends)
        return sorted(paths)

    def _type_of(self, name: str) -> DType:
        return self.stored_as.get(name.removeprefix(_PREFIX), self.dtype)

    def file(self) -> tuple[bytes, Any, dict[str, Array]]:
        """The weights' file: the bytes that begin it, its header, and stored tensors by name.

        Raises:
            PackError: There is nothing to write.
        """
        tensors = self.tensors()
        if not tensors:
            raise PackError(
                "the result changes nothing", "The models are equal, or all weights are 0."
            )
        stored: dict[str, Array] = {}
        for name, values in tensors.items():
            flat = np.ascontiguousarray(values).reshape(-1)
            out = np.empty(flat.size, self._type_of(name).storage)
            encode(flat, self._type_of(name), out)
            stored[name] = out
        specs = ((name, self._type_of(name), values.shape) for name, values in tensors.items())
        prefix, header = write_header(specs, {"format": "pt"})
        return prefix, header, stored


def config_files(adapter: NewAdapter, to_json: Any) -> Mapping[str, bytes]:
    """The small files beside the weights, by name."""
    return {CONFIG_NAME: to_json(adapter.config())}


def relative_base(name: str | None, adapter: Path, final: Path) -> str | None:
    """A base's name as it reads from another folder, where it is a path relative to the adapter."""
    if name is None or not name.startswith("."):
        return name
    import os

    return os.path.relpath((adapter / name).resolve(), final.resolve())
