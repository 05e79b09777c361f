"""Real weights, lent to the modules of a model that has none, for as long as they are needed.

The model is built on the meta device and every parameter gets the data of a single zero, stretched
to its shape. What a module's parameters really hold is read when it is lent to it, and forgotten
when it is given back, so the memory is that of the modules that borrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array

__all__ = ["Lender", "Originals", "replace_parameters", "stretch"]


@dataclass(frozen=True)
class Originals:
    """The parameters that an empty model had before anything was put on it.

    Attributes:
        paths: Paths of each parameter by its identity; several where modules share it.
        held: The parameters, held so that no other object takes their identity.
    """

    paths: Mapping[int, tuple[str, ...]]
    held: tuple[Any, ...]

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self.paths

    def sharing(self, parameter: str) -> tuple[str, ...]:
        """The paths that share a parameter with this one, itself included."""
        return next((paths for paths in self.paths.values() if parameter in paths), (parameter,))


def stretch(model: Any) -> Originals:
    """Give every parameter of a model on the meta device the data of a single zero."""
    import torch

    return replace_parameters(model, lambda parameter, _: torch.zeros(1).expand(parameter.shape))


def replace_parameters(model: Any, make: Callable[[Any, str], Any]) -> Originals:
    """Give every parameter of a model other data; what modules share stays shared.

    Args:
        model: Changed.
        make: Gives the data for a parameter and the first of its paths.
    """
    import torch

    made: dict[int, Any] = {}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}".lstrip(".")
            if id(parameter) not in made:
                data = make(parameter, full)
                made[id(parameter)] = torch.nn.Parameter(data, requires_grad=False)
            own = made[id(parameter)]
            module._parameters[name] = own  # noqa: SLF001
            paths.setdefault(id(own), []).append(full)
    return Originals({key: tuple(own) for key, own in paths.items()}, tuple(made.values()))


class Lender:
    """Lends modules their real weights.

    Args:
        base: Where they are read from.
        names: Where each parameter lies in the base.
        carried: Parameters that the adapter carries itself: names of its tensors by path.
        tensors: Of the adapter.
        originals: Tells which parameters the base keeps one tensor for.
    """

    def __init__(
        self,
        base: Checkpoint,
        names: ModelNames,
        carried: Mapping[str, str],
        tensors: Checkpoint,
        originals: Originals,
    ) -> None:
        self._base = base
        self._names = names
        self._carried = carried
        self._tensors = tensors
        self._originals = originals

    @contextmanager
    def lent(self, module: Any, path: str) -> Iterator[None]:
        """Fill the parameters of a module, and empty them again.

        What the files hold in another form (stacked experts) is no weight of a layer: it stays.
        """
        import torch

        returned = []
        for inside, parameter in list(module.named_parameters()):
            values = self._read(f"{path}.{inside}".lstrip("."))
            if values is None:
                continue
            place, _, name = inside.rpartition(".")
            owner = module.get_submodule(place)
            returned.append((owner, name, parameter))
            real = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
            owner._parameters[name] = real  # noqa: SLF001
        try:
            yield
        finally:
            for owner, name, parameter in returned:
                owner._parameters[name] = parameter  # noqa: SLF001

    def _read(self, parameter: str) -> Array | None:
        """Values of a parameter, float32 and its own copy; None if no tensor holds just them."""
        for shared in (parameter, *self._originals.sharing(parameter)):
            if shared in self._carried:
                return read_float(self._tensors, self._carried[shared]).astype(np.float32)
        for shared in (parameter, *self._originals.sharing(parameter)):
            places = self._names.find(shared)
            if len(places) == 1 and places[0].expert is None:
                return read_float(self._base, places[0].tensor).astype(np.float32)
        return None
