"""PEFT's layers on a model without data: how they are created, and kept as small as they can be.

PEFT's tuners create a layer for each module that they adapt. Here they do so while the module has
the weights that the layer is computed from, and what layers would hold twice, or for all modules at
once, they do not: equal constants are shared, a merge leaves no copies behind, and layers that hold
as much as the base's weights are created for one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from mergekit_lite.adapters.lending import Lender

__all__ = ["Layers", "empty", "unchanged"]


class Layers:
    """The layers that a tuner creates.

    Args:
        tuner: Class of PEFT that creates them.
        lender: Lends modules their weights meanwhile; None where only shapes matter.
        whole: Whether all layers are computed together, from the whole model.
        one_by_one: Whether layers are to be empty until they are renewed.
        outlined: Whether layers need not be computed, only their shapes.
    """

    def __init__(
        self,
        tuner: Any,
        lender: Lender | None,
        *,
        whole: bool = False,
        one_by_one: bool = False,
        outlined: bool = False,
    ) -> None:
        self._tuner = tuner
        self._lender = lender
        self._whole = whole
        self._one_by_one = one_by_one
        self._outlined = outlined or one_by_one
        self._again: dict[str, Callable[[], None]] = {}
        self._constants: dict[tuple[Any, ...], list[Any]] = {}

    @contextmanager
    def created(self, model: Any) -> Iterator[None]:
        """Stand between the tuner and the layers that it creates on a model."""
        create = self._tuner._create_and_replace  # noqa: SLF001

        def creating(self_: Any, *args: Any, **keys: Any) -> None:
            path = str(keys.get("current_key") or args[-1])
            again = partial(create, self_, *args, **keys)
            with self._meanwhile(model.get_submodule(path), path):
                again()
            layer = model.get_submodule(path)
            if self._one_by_one:
                self._again[path] = again
            if self._outlined:
                empty(layer)
            else:
                self._share_constants(layer)

        self._tuner._create_and_replace = creating  # noqa: SLF001
        try:
            with self._lender.lent(model, "") if self._lender and self._whole else nullcontext():
                yield
        finally:
            self._tuner._create_and_replace = create  # noqa: SLF001

    def renew(self, path: str) -> None:
        """Create a layer that is empty once more, from the weights that its module has now."""
        self._again[path]()

    def is_empty(self, path: str) -> bool:
        """Whether a layer has to be renewed before it is used."""
        return path in self._again

    def _meanwhile(self, module: Any, path: str) -> AbstractContextManager[None]:
        if self._outlined:
            return _on_meta(module)
        if self._lender is None or self._whole:
            return nullcontext()
        return self._lender.lent(module, path)

    def _share_constants(self, layer: Any) -> None:
        """Hold what layers compute from their shape alone once for all that have that shape."""
        import torch

        for module in layer.modules():
            for name in module._non_persistent_buffers_set:  # noqa: SLF001
                buffer = module._buffers[name]  # noqa: SLF001
                if buffer is None:
                    continue
                alike = self._constants.setdefault((tuple(buffer.shape), buffer.dtype), [])
                equal = next((held for held in alike if torch.equal(held, buffer)), None)
                if equal is None:
                    alike.append(buffer)
                else:
                    module._buffers[name] = equal  # noqa: SLF001


def empty(layer: Any) -> None:
    """Give every tensor of a layer the data of a single zero."""
    import torch

    for module in layer.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001
            for name, tensor in tensors.items():
                if tensor is not None and tensor.untyped_storage().nbytes() != tensor.itemsize:
                    zeros = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = (
                        torch.nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
                    )


@contextmanager
def _on_meta(module: Any) -> Iterator[None]:
    """Leave a module nothing but shapes, so that what is computed from it costs nothing."""
    import torch

    held = dict(module._parameters)  # noqa: SLF001
    for name, parameter in held.items():
        if parameter is not None:
            shape = torch.empty(parameter.shape, device="meta")
            module._parameters[name] = torch.nn.Parameter(shape, requires_grad=False)  # noqa: SLF001
    try:
        yield
    finally:
        module._parameters.update(held)  # noqa: SLF001


@contextmanager
def unchanged(layer: Any) -> Iterator[None]:
    """Undo what merging leaves in a layer: that it is merged, and copies of weights."""

    def kept(value: Any) -> Any:
        return value.copy() if isinstance(value, dict | list | set) else value

    states = [
        (module, {name: kept(value) for name, value in vars(module).items()})
        for module in layer.modules()
    ]
    try:
        yield
    finally:
        for module, state in states:
            vars(module).clear()
            vars(module).update(state)
