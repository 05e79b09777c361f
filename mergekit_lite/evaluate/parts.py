"""A model of transformers whose parameters are on torch's meta device until they are needed.

Parameters come from any checkpoint, by the names that transformers' own loading gives them. What a
model computes for itself (frequencies of rotary embeddings, scales) it computes as when it is
loaded whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mergekit_lite.adapters.architecture import quiet
from mergekit_lite.adapters.lora import Part
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.checkpoint.quantized import refuse_unread
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["Parts"]


class Parts:
    """The modules of one model, filled and emptied.

    Args:
        checkpoint: Where parameters are read from.
        dtype: torch's type that they are computed with.
        device: torch's device that they are filled on.

    Attributes:
        names: Where its parameters lie in the checkpoint.
        model: The whole model; its parameters are on the meta device.

    Raises:
        PackError: transformers has no such model, or its weights are codes that are not read here.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: Any, device: str) -> None:
        refuse_unread(checkpoint)
        self._checkpoint = checkpoint
        self.names = ModelNames(checkpoint)
        self._dtype = dtype
        self._device = device
        self.model: Any = self.names.model
        self._shared = _shared(self.model)
        self._compute_buffers()

    def _compute_buffers(self) -> None:
        """Give buffers that no file holds their values, as transformers does when it loads."""
        import torch

        with quiet(), torch.no_grad():
            for module in self.model.modules():
                own = module._non_persistent_buffers_set  # noqa: SLF001
                missing = [n for n in own if (b := module._buffers[n]) is not None and b.is_meta]  # noqa: SLF001
                for name in missing:
                    empty = torch.empty_like(module._buffers[name], device=self._device)  # noqa: SLF001
                    module._buffers[name] = empty  # noqa: SLF001
                if missing:
                    self.model._init_weights(module)  # noqa: SLF001

    def read(self, path: str) -> dict[str, Any]:
        """The parameters below a module, in memory, by their names below it.

        Args:
            path: Of the module.

        Raises:
            PackError: The checkpoint has none of that name, or one of another shape.
        """
        import torch

        module = self.model.get_submodule(path)
        found = {}
        for name, tensor in _tensors(module):
            values = self._values(f"{path}.{name}", tuple(tensor.shape))
            dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
            found[name] = torch.from_numpy(values).to(dtype)
        return found

    def parameter(self, path: str) -> Any:
        """One parameter or stored buffer, float32, wherever the model holds it now.

        Raises:
            PackError: The checkpoint has none of that name, or one of another shape.
        """
        import torch

        owner, name = _owner(self.model, path)
        return torch.from_numpy(self._values(path, tuple(getattr(owner, name).shape)))

    def fill(self, path: str, values: dict[str, Any]) -> None:
        """Put parameters into a module."""
        import torch

        module = self.model.get_submodule(path)
        for name, value in values.items():
            owner, own = _owner(module, name)
            value = value.to(self._device)
            if own in owner._parameters:  # noqa: SLF001
                owner._parameters[own] = torch.nn.Parameter(value, requires_grad=False)  # noqa: SLF001
            else:
                owner._buffers[own] = value  # noqa: SLF001

    def empty(self, path: str) -> None:
        """Put a module's parameters back onto the meta device."""
        import torch

        module = self.model.get_submodule(path)
        for name, tensor in list(_tensors(module, meta=False)):
            owner, own = _owner(module, name)
            gone = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            if own in owner._parameters:  # noqa: SLF001
                owner._parameters[own] = torch.nn.Parameter(gone, requires_grad=False)  # noqa: SLF001
            else:
                owner._buffers[own] = gone  # noqa: SLF001

    def _values(self, parameter: str, shape: tuple[int, ...]) -> Array:
        for name in (parameter, *self._shared.get(parameter, ())):
            places = self.names.find(name)
            if places:
                values = self._assembled(places, shape)
                if values.shape != shape:
                    raise PackError(
                        f"{self._checkpoint.label}: '{places[0].tensor}' is "
                        f"{list(values.shape)}, the model of its config.json has {list(shape)}",
                        "Check that config.json belongs to these weights.",
                    )
                return values
        raise PackError(
            f"{self._checkpoint.label}: has no tensor for '{parameter}'",
            "Check that config.json belongs to these weights.",
        )

    def _assembled(self, places: tuple[Part, ...], shape: tuple[int, ...]) -> Array:
        """One tensor, or experts that files hold one by one."""
        if len(places) == 1 and places[0].expert is None:
            return np.ascontiguousarray(read_float(self._checkpoint, places[0].tensor), np.float32)
        whole = np.empty(shape, np.float32)
        for place in places:
            rows = slice(None) if place.rows is None else slice(*place.rows)
            whole[place.expert, rows] = read_float(self._checkpoint, place.tensor)
        return whole


def _tensors(module: Any, meta: bool = True) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers that files hold, on the meta device or in memory."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta is meta:
            yield name, parameter
    for inside, owner in module.named_modules():
        for name, buffer in owner._buffers.items():  # noqa: SLF001
            stored = name not in owner._non_persistent_buffers_set  # noqa: SLF001
            if buffer is not None and stored and buffer.is_meta is meta:
                yield f"{inside}.{name}".lstrip("."), buffer


def _owner(module: Any, name: str) -> tuple[Any, str]:
    place, _, own = name.rpartition(".")
    return module.get_submodule(place), own


def _shared(model: Any) -> dict[str, tuple[str, ...]]:
    """Paths that share a parameter, by each of them (tied embeddings)."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is not None:
                paths.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return {
        path: tuple(other for other in group if other != path)
        for group in paths.values() if len(group) > 1 for path in group
    }  # fmt: skip
