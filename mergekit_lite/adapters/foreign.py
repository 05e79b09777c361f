"""Adapters whose merged weights PEFT's own layers compute, one module at a time.

The model is built without data: every parameter of the base is one zero, stretched to its shape.
PEFT puts its layers on it and loads the adapter. When a tensor is asked for, the module that it
belongs to gets its real weights, its layer merges them, the result is taken, and the zero returns.
So the memory is that of the adapter and of one module.

Some types also compute a part of themselves from the base when they are created. Their layers are
created anew before the first merge, each with the real weights of its module; of FRoD, which
decomposes layers together, all at once with the weights of the whole base.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from mergekit_lite.adapters.architecture import quiet, require_peft
from mergekit_lite.adapters.config import AdapterConfig
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.adapters.types import FROM_WHOLE_BASE, is_made_from_base
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["ForeignAdapter"]

_WRONG = "Check that this is the base that the adapter was trained on."


class ForeignAdapter:
    """An adapter that PEFT merges.

    Attributes:
        targets: Names of the base's tensors that it may change.

    Raises:
        PackError: PEFT is not installed, does not know the adapter, or the adapter's tensors are
            not those that its config and the base call for.
    """

    targets: tuple[str, ...]

    def __init__(
        self, config: AdapterConfig, tensors: Checkpoint, base: Checkpoint, names: ModelNames
    ) -> None:
        require_peft(config.label)
        self._config = config
        self._tensors = tensors
        self._base = base
        self._names = names
        self._lock = threading.Lock()
        self._computed: dict[str, Array] = {}
        self._model = self._inject(None)
        self._own_base = self._check()
        self._modules = self._changed_modules()
        self._where = {tensor: path for path, own in self._modules.items() for tensor in own}
        self.targets = tuple(sorted(self._where))
        self._ready = False

    def merged(self, name: str) -> Array:
        """The base's tensor with the adapter merged in; float32, of the tensor's shape."""
        with self._lock:
            if name not in self._computed:
                self._computed |= self._merge(self._where[name])
            return self._computed.pop(name)

    def _inject(self, weights: _BaseWeights | None) -> Any:
        """Let PEFT put its layers on the empty model.

        Args:
            weights: Gives modules their real weights while their layer is created; None for none.
        """
        import peft
        import torch
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        from mergekit_lite.adapters.architecture import build_empty

        model = build_empty(self._base)
        _stretch(model)
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                settings = peft.PeftConfig.from_pretrained(str(self._tensors.folder))
                settings.inference_mode = True
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type]
                whole = self._config.kind in FROM_WHOLE_BASE
                with _real_weights(tuner, model, weights, whole=whole):
                    return peft.get_peft_model(model, settings)
        except PackError:
            raise
        except Exception as error:
            raise self._failed("put its layers on the base", error) from None

    def _failed(self, what: str, error: Exception) -> PackError:
        text = (str(error).splitlines() or [""])[0][:160]
        return PackError(
            f"{self._config.label}: PEFT could not {what} ({type(error).__name__}: {text})",
            "Check adapter_config.json, and that this is the base that it was trained on.",
        )

    def _check(self) -> dict[str, str]:
        """Compare the adapter's tensors with those that PEFT would save.

        Returns:
            Weights of the base that the adapter carries itself, by path of the parameter.
        """
        import peft

        with quiet():
            expected = peft.get_peft_model_state_dict(self._model, save_embedding_layers=False)
        found = set(self._tensors.names())
        own_base = {
            _base_path(name): name for name in found - expected.keys() if ".base_layer." in name
        }
        missing = sorted(expected.keys() - found)
        leftovers = sorted(found - expected.keys() - set(own_base.values()))
        for names, what in ((missing, "lacks"), (leftovers, "holds, and nothing there needs,")):
            if names:
                listed = "".join(f"\n  {name}" for name in names[:10])
                more = f"\n  … and {len(names) - 10} more" if len(names) > 10 else ""
                raise PackError(
                    f"{self._config.label}: {what} {len(names)} tensor(s):{listed}{more}", _WRONG
                )
        if self._config.kind != "ADALORA":  # its ranks are cut while loading
            for name in sorted(expected):
                shape, wanted = self._tensors.spec(name).shape, tuple(expected[name].shape)
                if shape != wanted:
                    raise PackError(
                        f"{self._config.label}: '{name}' is {list(shape)}, while its config and "
                        f"the base call for {list(wanted)}",
                        _WRONG,
                    )
        return own_base

    def _changed_modules(self) -> dict[str, dict[str, str]]:
        """Tensors of the files by path of the changed module: name in the files, and in it."""
        modules: dict[str, dict[str, str]] = {}
        tied = _shared(self._model)
        for path, layer in _changed_layers(self._model.base_model.model):
            own: dict[str, str] = {}
            for inside, weight in _original(layer).named_parameters():
                parameter = f"{_clean(path)}.{inside}"
                places = self._names.find(parameter)
                if not places and id(weight) in tied:
                    continue
                if len(places) != 1 or places[0].expert is not None:
                    raise PackError(
                        f"{self._config.label}: '{parameter}' is changed, which the base's files "
                        f"{'do not hold' if not places else 'hold in another form'}",
                        _WRONG,
                    )
                own[places[0].tensor] = inside
            modules[path] = own
        return modules

    def _load(self) -> None:
        """Load the adapter's tensors; create layers that depend on the base with real weights."""
        import peft
        import torch

        weights = _BaseWeights(self._base, self._names, self._own_base, self._tensors)
        if is_made_from_base(self._config):
            self._model = self._inject(weights)
        carried = set(self._own_base.values())
        state = {
            name: torch.from_numpy(read_float(self._tensors, name).copy())
            if self._tensors.spec(name).dtype.is_float
            else torch.from_numpy(np.array(self._tensors.read(name)))
            for name in self._tensors.names()
            if name not in carried
        }
        try:
            with quiet():
                peft.set_peft_model_state_dict(self._model, state)
        except Exception as error:
            raise self._failed("load it", error) from None
        self._weights = weights
        self._ready = True

    def _merge(self, path: str) -> dict[str, Array]:
        """Merge one module; returns its tensors by their names in the files."""
        import torch

        if not self._ready:
            self._load()
        layer = self._model.base_model.model.get_submodule(path)
        original = _original(layer)
        try:
            with quiet(), torch.no_grad(), self._weights.filled(original, _clean(path)):
                if hasattr(layer, "unload_and_optionally_merge_module"):
                    result = layer.unload_and_optionally_merge_module(
                        merge=True, safe_merge=False, adapter_names=None
                    )
                else:
                    layer.merge(safe_merge=False, adapter_names=None)
                    result = layer.get_base_layer()
                taken = {
                    inside: np.array(parameter.detach().float().numpy())
                    for inside, parameter in result.named_parameters()
                }
        except Exception as error:
            raise self._failed(f"merge '{_clean(path)}'", error) from None
        finally:
            for module in (layer, getattr(layer, "token_adapter", None)):
                if isinstance(getattr(module, "merged_adapters", None), list):
                    module.merged_adapters.clear()  # type: ignore[union-attr]
        return {tensor: taken[inside] for tensor, inside in self._modules[path].items()}


class _BaseWeights:
    """Gives modules of the empty model their real weights for a while."""

    def __init__(
        self,
        base: Checkpoint,
        names: ModelNames,
        own_base: Mapping[str, str],
        tensors: Checkpoint,
    ) -> None:
        self._base = base
        self._names = names
        self._own_base = own_base
        self._tensors = tensors

    @contextmanager
    def filled(self, module: Any, path: str) -> Iterator[None]:
        """Fill the parameters of a module, and empty them again.

        What the files hold in another form (stacked experts) is no weight of a layer: it stays.
        """
        import torch

        held = []
        for inside, parameter in list(module.named_parameters()):
            if not self._is_plain(f"{path}.{inside}".lstrip(".")):
                continue
            owner = module.get_submodule(inside.rpartition(".")[0])
            name = inside.rpartition(".")[2]
            held.append((owner, name, parameter))
            real = torch.from_numpy(self._read(f"{path}.{inside}".lstrip(".")).copy())
            owner._parameters[name] = torch.nn.Parameter(real, requires_grad=False)  # noqa: SLF001
        try:
            yield
        finally:
            for owner, name, parameter in held:
                owner._parameters[name] = parameter  # noqa: SLF001

    def _is_plain(self, parameter: str) -> bool:
        places = self._names.find(parameter)
        return parameter in self._own_base or (len(places) == 1 and places[0].expert is None)

    def _read(self, parameter: str) -> Array:
        if parameter in self._own_base:
            return read_float(self._tensors, self._own_base[parameter]).astype(np.float32)
        [place] = self._names.find(parameter)
        return read_float(self._base, place.tensor).astype(np.float32)


@contextmanager
def _real_weights(
    tuner: Any, model: Any, weights: _BaseWeights | None, *, whole: bool
) -> Iterator[None]:
    """Have the tuner create each layer while its module, or the model, holds its real weights."""
    if weights is None:
        yield
        return
    if whole:
        with weights.filled(model, ""):
            yield
        return
    create = tuner._create_and_replace  # noqa: SLF001

    def filled(self: Any, config: Any, adapter: str, target: Any, *args: Any, **keys: Any) -> None:
        with weights.filled(target, str(keys.get("current_key") or args[-1])):
            create(self, config, adapter, target, *args, **keys)

    tuner._create_and_replace = filled  # noqa: SLF001
    try:
        yield
    finally:
        tuner._create_and_replace = create  # noqa: SLF001


def _stretch(model: Any) -> None:
    """Give every parameter of a model on the meta device the data of a single zero."""
    import torch

    seen: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in seen:
                zeros = torch.zeros(1).expand(parameter.shape)
                seen[id(parameter)] = torch.nn.Parameter(zeros, requires_grad=False)
            module._parameters[name] = seen[id(parameter)]  # noqa: SLF001


def _changed_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The outermost PEFT layers and wrappers of a model, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(outer + ".") for outer in inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside.append(path)
            yield path, module


def _original(layer: Any) -> Any:
    """The module of the base that a layer or wrapper stands for."""
    module = getattr(layer, "original_module", layer)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _shared(model: Any) -> set[int]:
    """Identities of the parameters that two modules share."""
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {key for key, count in counts.items() if count > 1}


def _clean(path: str) -> str:
    return path.replace(".base_layer", "").replace(".original_module", "")


def _base_path(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
