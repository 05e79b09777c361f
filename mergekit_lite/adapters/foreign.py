"""Adapters whose merged weights PEFT's own layers compute, one module at a time.

The model is built without data (see `mergekit_lite.adapters.lending`). PEFT puts its layers on it
and loads the adapter. When a tensor is asked for, the module that it belongs to is lent its real
weights, its layer merges them, and the result is taken. So the memory is that of the adapter and of
one module.

What the adapter carries of the base itself (trained biases; embeddings, which PEFT saves beside
factors on them) takes the place of the base's. Where the base keeps one tensor for the input and
the output embedding, and the adapter changes one of them or each in its own way, the output gets a
tensor of its own, so that the result computes what the adapter beside its base computes.

Some types also compute a part of themselves from the base when they are created. Their layers are
created anew before the first merge, each with the real weights of its module; of OSF, whose layers
are as large as the base's, for one module at a time; of FRoD, which decomposes layers together, all
at once with the weights of the whole base.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mergekit_lite.adapters.agreement import Contents, account_for, base_path, check_keys
from mergekit_lite.adapters.architecture import quiet, require_peft
from mergekit_lite.adapters.config import AdapterConfig
from mergekit_lite.adapters.contents import PREFIX
from mergekit_lite.adapters.layers import Layers, empty, unchanged
from mergekit_lite.adapters.lending import Lender, Originals, stretch
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.adapters.types import (
    FROM_WHOLE_BASE,
    ONE_BY_ONE,
    OUTLINED,
    is_made_from_base,
    is_shaped_by_base,
)
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["ForeignAdapter"]

_PEFT = threading.RLock()
"""Held while PEFT works: its classes, warnings and random numbers belong to the process."""

_WRONG = "Check that this is the base that the adapter was trained on."


class ForeignAdapter:
    """An adapter that PEFT merges.

    Attributes:
        targets: Names of the tensors that it may change.
        copied: Those of them that the base has not, because it keeps one tensor for two
            embeddings, and others that must part from it: the base's tensor that each begins as.
        added: Tensors that the base has not at all: the adapter's names by those in the result.
        notes: What the user should know.

    Raises:
        PackError: PEFT is not installed, does not know the adapter, or the adapter's tensors are
            not those that its config and the base call for.
    """

    targets: tuple[str, ...]
    copied: Mapping[str, str]
    added: Mapping[str, str]
    notes: tuple[str, ...]

    def __init__(
        self, config: AdapterConfig, tensors: Checkpoint, base: Checkpoint, names: ModelNames
    ) -> None:
        require_peft(config.label)
        self._config = config
        self._tensors = tensors
        self._base = base
        self._names = names
        self._computed: dict[str, Array] = {}
        self._inject(None)
        self._contents = self._check(exact=not is_shaped_by_base(config))
        self.added = self._contents.added
        self._modules, followers = self._changed_modules()
        self.copied = self._parted(followers)
        self.notes = tuple(
            f"{config.label} changes only one of the tied input and output embeddings, or each in "
            f"its own way; '{name}' becomes a tensor of its own"
            for name in self.copied
        )
        self._where = {tensor: path for path, own in self._modules.items() for tensor in own}
        self._replaced = self._replacements()
        self.targets = tuple(sorted({*self._where, *self._replaced}))
        self._ready = False

    def merged(self, name: str) -> Array:
        """A tensor of the base with the adapter merged in; float32, of the tensor's shape."""
        if name in self._replaced:
            return read_float(self._tensors, self._replaced[name]).astype(np.float32)
        with _PEFT:
            if name not in self._computed:
                self._computed |= self._merge(self._where[name])
            return self._computed.pop(name)

    def _inject(self, lender: Lender | None) -> None:
        """Let PEFT put its layers on the empty model.

        Args:
            lender: Gives modules their real weights while their layer is created; None for none.
        """
        import peft
        import torch
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        from mergekit_lite.adapters.architecture import build_empty

        model = build_empty(self._base)
        self._originals: Originals = stretch(model)
        try:
            with _PEFT, quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                settings = peft.PeftConfig.from_pretrained(str(self._tensors.folder))
                check_keys(self._config, settings)
                settings.inference_mode = True
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type]
                kind = self._config.kind
                self._layers = Layers(
                    tuner,
                    lender,
                    whole=kind in FROM_WHOLE_BASE,
                    one_by_one=kind in ONE_BY_ONE,
                    outlined=lender is None and kind in OUTLINED,
                )
                with self._layers.created(model):
                    self._model = peft.get_peft_model(model, settings)
        except PackError:
            raise
        except Exception as error:
            raise self._failed("put its layers on the base", error) from None
        self._model.eval()

    def _failed(self, what: str, error: Exception) -> PackError:
        text = (str(error).splitlines() or [""])[0][:160]
        return PackError(
            f"{self._config.label}: PEFT could not {what} ({type(error).__name__}: {text})",
            "Check adapter_config.json, and that this is the base that it was trained on.",
        )

    def _check(self, *, exact: bool) -> Contents:
        with _PEFT:
            return account_for(
                self._config, self._tensors, self._base, self._model, self._originals, exact=exact
            )

    def _changed_modules(self) -> tuple[dict[str, dict[str, str]], set[str]]:
        """What PEFT's layers change.

        Returns:
            Names of tensors, and of the parameters inside the module that they are, by path of
            the module; and the parameters that merely follow an embedding that they share.
        """
        modules: dict[str, dict[str, str]] = {}
        followers: set[str] = set()
        for path, layer in _changed_layers(self._model.base_model.model):
            own: dict[str, str] = {}
            for inside, _ in _original(layer).named_parameters():
                parameter = f"{base_path(path)}.{inside}"
                places = self._names.find(parameter)
                if _follows(layer):
                    followers.add(parameter)
                elif not places and self._stored(parameter):
                    own[parameter] = inside
                elif len(places) == 1 and places[0].expert is None:
                    own[places[0].tensor] = inside
                else:
                    raise self._not_there(parameter, held=bool(places))
            modules[path] = own
        return modules, followers

    def _not_there(self, parameter: str, *, held: bool) -> PackError:
        return PackError(
            f"{self._config.label}: '{parameter}' is changed, which the base's files "
            f"{'hold in another form' if held else 'do not hold'}",
            _WRONG,
        )

    def _stored(self, parameter: str) -> str | None:
        """The base's tensor that holds a parameter and no more, or one that shares it."""
        for shared in (parameter, *self._originals.sharing(parameter)):
            places = self._names.find(shared)
            if len(places) == 1 and places[0].expert is None:
                return places[0].tensor
        return None

    def _parted(self, followers: set[str]) -> dict[str, str]:
        """Parameters that no longer share the base's tensor, and that tensor.

        Those that the adapter changes, and those that shared what it changes.
        """
        changed = {tensor for own in self._modules.values() for tensor in own}
        parted: dict[str, str] = {}
        for paths in self._originals.paths.values():
            tensor = self._stored(paths[0]) if len(paths) > 1 else None
            if tensor is None or not changed & {tensor, *paths}:
                continue
            parted |= {
                path: tensor
                for path in paths
                if not self._names.find(path) and path not in followers
            }
        return parted

    def _replacements(self) -> dict[str, str]:
        """The adapter's tensors that take the place of the base's as they are, by those' names."""
        replaced: dict[str, str] = {}
        for parameter, name in self._contents.carried.items():
            tensor = self._stored(parameter)
            if tensor is None:
                raise self._not_there(parameter, held=bool(self._names.find(parameter)))
            if tensor not in self._where:
                replaced[tensor] = name
        return replaced

    def _load(self) -> None:
        """Load the adapter's tensors; create layers that depend on the base with real weights."""
        lender = Lender(
            self._base, self._names, self._contents.carried, self._tensors, self._originals
        )
        if is_made_from_base(self._config):
            self._inject(lender)
            self._check(exact=True)
        self._lender = lender
        one_by_one = self._config.kind in ONE_BY_ONE
        self._give(self._of_layers([]) if one_by_one else self._tensors.names())
        self._ready = True

    def _give(self, names: Iterable[str]) -> None:
        """Load tensors of the adapter into PEFT's layers."""
        import peft
        import torch

        state = {
            name: torch.from_numpy(read_float(self._tensors, name).copy())
            if self._tensors.spec(name).dtype.is_float
            else torch.from_numpy(np.array(self._tensors.read(name)))
            for name in names
            if name not in self._contents.whole
        }
        try:
            with quiet():
                peft.set_peft_model_state_dict(self._model, state)
        except Exception as error:
            raise self._failed("load it", error) from None

    def _merge(self, path: str) -> dict[str, Array]:
        """Merge one module; returns its tensors by their names."""
        import torch

        if not self._ready:
            self._load()
        original = _original(self._layer(path))
        try:
            with quiet(), torch.no_grad(), self._lender.lent(original, base_path(path)):
                if self._layers.is_empty(path):
                    self._layers.renew(path)
                    self._give(self._of_layers([path]))
                layer = self._layer(path)
                with unchanged(layer):
                    taken = _merged_weights(layer)
                if self._layers.is_empty(path):
                    empty(layer)
        except PackError:
            raise
        except Exception as error:
            raise self._failed(f"merge '{base_path(path)}'", error) from None
        return {tensor: taken[inside] for tensor, inside in self._modules[path].items()}

    def _layer(self, path: str) -> Any:
        return self._model.base_model.model.get_submodule(path)

    def _of_layers(self, paths: Sequence[str]) -> list[str]:
        """Names of the tensors of some layers, and of all modules that the adapter replaces.

        PEFT does not load the ones without the others.
        """
        from peft.utils.other import AuxiliaryTrainingWrapper

        replaced = [
            p for p in self._modules if isinstance(self._layer(p), AuxiliaryTrainingWrapper)
        ]
        starts = tuple(f"{PREFIX}{path}." for path in (*paths, *replaced))
        return [name for name in self._tensors.names() if name.startswith(starts)]


def _merged_weights(layer: Any) -> dict[str, Array]:
    """Merge a layer into its module; copies of the module's parameters by name."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        result = layer.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    else:
        layer.merge(safe_merge=False, adapter_names=None)
        result = layer.get_base_layer()
    return {
        inside: np.array(parameter.detach().float().numpy())
        for inside, parameter in result.named_parameters()
    }


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


def _follows(layer: Any) -> bool:
    """Whether a layer only repeats what another does to an embedding that they share."""
    tokens = getattr(layer, "token_adapter", layer)
    return getattr(tokens, "tied_adapter", None) is not None
