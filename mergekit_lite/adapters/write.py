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
from mergekit_lite.adapters.contents import TIED
from mergekit_lite.checkpoint.header import write_header
from mergekit_lite.dtypes import DTYPES, Array, DType
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.cast import encode

__all__ = ["WEIGHTS_NAME", "BaseName", "NewAdapter", "NewModule"]

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NO_TARGETS = "dummy-target-modules"
"""PEFT's word (``DUMMY_TARGET_MODULES``) for an adapter that only carries tensors whole."""


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
        tied: Paths of the input embedding and of the output embedding that shares its tensor in
            the base and in the result; None where there is no such pair, or it is not changed.
        dtype: Type of the factors.
    """

    base: BaseName
    modules: list[NewModule] = field(default_factory=list)
    whole: dict[str, Array] = field(default_factory=dict)
    stored_as: dict[str, DType] = field(default_factory=dict)
    others: Sequence[str] | None = None
    fan_in_fan_out: bool = False
    task: str | None = None
    tied: tuple[str, str] | None = None
    dtype: DType = DTYPES["F32"]

    def tensors(self) -> dict[str, Array]:
        """All tensors under PEFT's names, sorted."""
        found: dict[str, Array] = {}
        for module in self._modules():
            path = _PREFIX + module.path
            if module.embedding:
                found[f"{path}.lora_embedding_A"] = module.a
                found[f"{path}.lora_embedding_B"] = module.b
            else:
                found[f"{path}.lora_A.weight"] = module.a
                found[f"{path}.lora_B.weight"] = module.b
            if module.bias is not None:
                found[f"{path}.base_layer.bias"] = module.bias
        found |= {_PREFIX + name: tensor for name, tensor in self._whole().items()}
        return dict(sorted(found.items()))

    def _modules(self) -> list[NewModule]:
        """All adapted modules; a tied output embedding, too, has factors of its own.

        PEFT could be told to tie them (``ensure_weight_tying``), but fails to load a tied tensor
        that is saved whole, and transposes the factors of a head beside Conv1D layers.
        """
        if self.tied is None:
            return self.modules
        embedding, head = self.tied
        shared = [module for module in self.modules if module.path == embedding]
        heads = [NewModule(head, module.b.T, module.a.T) for module in shared]
        return [*self.modules, *heads]

    def _whole(self) -> dict[str, Array]:
        embedding, head = self.tied or ("", "")
        shared = self.whole.get(f"{embedding}.weight")
        return self.whole if shared is None else {**self.whole, f"{head}.weight": shared}

    def config(self) -> dict[str, Any]:
        """Contents of adapter_config.json."""
        ranks = {module.path: int(module.a.shape[0]) for module in self._modules()}
        common = max(ranks.values(), key=lambda r: (list(ranks.values()).count(r), r), default=1)
        special = {path: rank for path, rank in sorted(ranks.items()) if rank != common}
        saved = sorted({name.rpartition(".")[0] for name in self._whole()})
        return {
            "alpha_pattern": special,
            "base_model_name_or_path": self.base.name,
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

    def _targets(self) -> list[str] | str:
        """Ends of paths if they mean these modules and no others, else whole paths."""
        paths = [module.path for module in self._modules()]
        if not paths:
            return _NO_TARGETS
        ends = {path.rpartition(".")[2] for path in paths}
        if self.others is not None and not any(
            path.rpartition(".")[2] in ends for path in self.others
        ):
            return sorted(ends)
        return sorted(paths)

    def _type_of(self, name: str) -> DType:
        embedding, head = self.tied or ("", "")
        parameter = name.removeprefix(_PREFIX)
        same = f"{embedding}.weight" if parameter == f"{head}.weight" else parameter
        return self.stored_as.get(same, self.dtype)

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
        metadata = {"format": "pt", **({TIED: self.tied[1]} if self.tied else {})}
        specs = ((name, self._type_of(name), values.shape) for name, values in tensors.items())
        prefix, header = write_header(specs, metadata)
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
