"""``output: adapter``: a recipe whose models are adapters, from start to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.adapters.base import check_base
from mergekit_lite.adapters.combine import Combination, Combined, LoraSource, Mix
from mergekit_lite.adapters.config import AdapterConfig, read_adapter_config
from mergekit_lite.adapters.factor import Target
from mergekit_lite.adapters.locate import open_adapter, open_model
from mergekit_lite.adapters.write import BaseName, NewAdapter, NewModule, relative_base
from mergekit_lite.checkpoint.layers import map_layers
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.dtypes import DTYPES, Array, by_config_name
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.random import key_of
from mergekit_lite.merge.adapter_output import write_adapter
from mergekit_lite.merge.lock import resolved_recipe
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import OutputFile, refuse_inputs
from mergekit_lite.methods import METHODS
from mergekit_lite.methods.base import Chunk, Method, Scratch, TensorContext
from mergekit_lite.recipe import ModelEntry, Recipe
from mergekit_lite.recipe.parameters import first_set

__all__ = ["AdapterResult", "run_adapter_merge"]

_SUMS = ("linear", "task_arithmetic")
_BY_ELEMENT = ("ties", "dare_ties", "dare_linear")


@dataclass(frozen=True)
class AdapterResult:
    """What a merge of adapters made.

    Attributes:
        folder: Where it lies.
        outputs: Its files, the lock included.
        seconds: Wall time.
        modules: Every module's combination.
        notes: What the user should know.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    seconds: float
    modules: Sequence[Combined]
    notes: Sequence[str]


def run_adapter_merge(
    recipe: Recipe, home: Path, folder: Path, *, force: bool, progress: Progress
) -> AdapterResult:
    """Merge adapters into one adapter.

    Args:
        recipe: With ``output: adapter``.
        home: Folder that relative paths start from.
        folder: Where the result goes.
        force: Whether an existing result of pack is replaced.
        progress: Told how far it is.

    Raises:
        PackError: The adapters cannot be combined so.
    """
    began = time.monotonic()
    method = METHODS[recipe.merge_method]
    target = _target(recipe, method)
    entries = [e for e in recipe.models or [] if e.model != recipe.base_model]
    if method.symmetric:
        entries = sorted(entries, key=lambda entry: (entry.model, repr(entry)))
    opened: list[Source] = []
    try:
        for entry in entries:
            opened.append(open_adapter(entry.model, home))  # noqa: PERF401 (closed on an error)
        base = open_model(recipe.base_model, home) if recipe.base_model else None
        opened += base.sources if base else ()
        refuse_inputs(folder, (source.path for source in opened))
        return _run(recipe, method, target, entries, opened, base, home, folder, force=force,
                    progress=progress, began=began)  # fmt: skip
    finally:
        for source in opened:
            source.checkpoint.close()


def _target(recipe: Recipe, method: Method) -> Target | None:
    target = Target(recipe.rank, recipe.energy)
    if recipe.slices is not None or method.name not in (*_SUMS, *_BY_ELEMENT):
        what = "slices" if recipe.slices is not None else f"'{method.name}'"
        raise PackError(
            f"{what} cannot make an adapter of adapters",
            f"Use 'models' and one of: {', '.join((*_SUMS, *_BY_ELEMENT))}",
        )
    if recipe.rank is None and recipe.energy is None:
        if method.name in _BY_ELEMENT:
            raise PackError(
                f"what '{method.name}' gives has no low rank of its own",
                "Say how much of it to keep: --rank 32, or --energy 0.95",
            )
        return None
    return target


def _run(
    recipe: Recipe,
    method: Method,
    target: Target | None,
    entries: Sequence[ModelEntry],
    opened: Sequence[Source],
    base: Source | None,
    home: Path,
    folder: Path,
    *,
    force: bool,
    progress: Progress,
    began: float,
) -> AdapterResult:
    adapters = opened[: len(entries)]
    configs = [read_adapter_config(a.path, a.reference) for a in adapters]
    notes = []
    if base is not None:
        for config, adapter in zip(configs, adapters, strict=True):
            notes += check_base(config, adapter, base, home)
    sources = [LoraSource.open(c, a.checkpoint) for c, a in zip(configs, adapters, strict=True)]
    combination = Combination(sources, base.checkpoint if base else None)
    mixes = _Mixes(recipe, method, entries, combination)
    new = NewAdapter(
        base=_one_base(configs, adapters, base, folder),
        fan_in_fan_out=any(c.data.get("fan_in_fan_out") is True for c in configs),
        task=next((c.data["task_type"] for c in configs if c.data.get("task_type")), None),
        dtype=by_config_name(recipe.out_dtype or recipe.dtype or "float32") or DTYPES["F32"],
    )
    sizes = {path: combination.nbytes(path) for path in combination.paths}
    progress.begin("Combine", sum(sizes.values()))
    done = []
    for path in combination.paths:
        combined = combination.module(path, mixes.of(f"{path}.weight"), target)
        done.append(combined)
        factored = combined.factored
        new.modules.append(NewModule(path, factored.a, factored.b, combined.embedding))
        progress.advance(sizes[path])
    for parameter in combination.whole:
        new.whole[parameter] = combination.tensor(parameter, mixes.of(parameter))
    notes += _full_ranks(done)
    fields = {
        "name": recipe.name,
        "version": recipe.version,
        "recipe": resolved_recipe(recipe, method.symmetric),
        "seed": recipe.seed,
        "notes": notes,
        "modules": {
            c.path: {"rank": c.factored.rank, "energy": round(c.factored.kept, 9)} for c in done
        },
    }
    outputs = write_adapter(new, folder, "adapter", fields, opened, force=force)
    return AdapterResult(folder, outputs, time.monotonic() - began, done, notes)


def _full_ranks(done: Sequence[Combined]) -> list[str]:
    full = [
        c.path
        for c in done
        if c.exact and c.factored.rank == min(c.factored.b.shape[0], c.factored.a.shape[1])
    ]
    if not full:
        return []
    count = f"{len(full)} module{'s' * (len(full) != 1)} (first '{full[0]}')"
    return [f"full rank is needed to be exact in {count}; --rank or --energy makes them small"]


def _one_base(
    configs: Sequence[AdapterConfig],
    adapters: Sequence[Source],
    base: Source | None,
    folder: Path,
) -> BaseName:
    """The base that all adapters name.

    Raises:
        PackError: They name different ones, and none was given.
    """
    names = {
        (relative_base(c.base, a.path, folder), c.revision)
        for c, a in zip(configs, adapters, strict=True)
    }
    if len(names) > 1 and base is None:
        listed = "".join(f"\n  {c.label}: {c.base}" for c in configs)
        raise PackError(
            f"the adapters were trained on different bases:{listed}",
            "Adapters of different bases cannot be one. If it is one base under several names, "
            "say which: base_model: …",
        )
    return BaseName(*min(names, key=repr))


class _Mixes:
    """How the recipe combines each tensor."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        entries: Sequence[ModelEntry],
        combination: Combination,
    ) -> None:
        self._recipe = recipe
        self._method = method
        self._entries = entries
        names = [f"{path}.weight" for path in combination.paths] + combination.whole
        self._layers = map_layers(names, {})

    def of(self, tensor: str) -> Mix:
        """How a tensor's changes are combined."""
        values = self._parameters(tensor)
        self._method.check(values)
        if self._method.name in _SUMS:
            weights = [float(weight) for weight in values["weight"]]
            factor = float(values.get("lambda", 1.0))
            if values["normalize"]:
                factor /= sum(weights)
            coefficients = [weight * factor for weight in weights]
            return Mix(coefficients, _weighted(coefficients))
        if self._method.spans_model(values):
            raise PackError(
                "'trim: global' looks at the whole model, while adapters are merged by module",
                "Set 'trim: tensor'.",
            )
        return Mix(None, lambda changes: self._by_element(tensor, values, changes))

    def _parameters(self, tensor: str) -> dict[str, Any]:
        position = self._layers.position(tensor)
        shared = self._recipe.settings()
        values: dict[str, Any] = {}
        for name, parameter in self._method.parameters.items():
            if parameter.each:
                found = [
                    first_set([entry.settings(), shared], name, tensor, position)
                    for entry in self._entries
                ]
                values[name] = tuple(_or_default(v, parameter, tensor) for v in found)
            else:
                value = first_set([shared], name, tensor, position)
                values[name] = _or_default(value, parameter, tensor)
        return values

    def _by_element(
        self, tensor: str, values: Mapping[str, Any], changes: Sequence[Array]
    ) -> Array:
        """Let the merge method combine full changes; their base is zero."""
        shape = changes[0].shape
        work = np.dtype(np.float64 if self._recipe.dtype == "float64" else np.float32)
        models = np.stack([change.reshape(-1) for change in changes]).astype(work)
        keys = [key_of(self._recipe.seed, entry.model, tensor) for entry in self._entries]
        context = TensorContext(
            elements=models.shape[1], block=max(1, 4096 // shape[1]) * shape[1],
            columns=shape[1], models=len(changes), work=work, keys=np.array(keys, np.uint64),
        )  # fmt: skip
        arguments: dict[str, Any] = {
            parameter.argument: np.array(values[name], np.float64)
            if parameter.each
            else values[name]
            for name, parameter in self._method.parameters.items()
        }
        out = np.empty(models.shape[1], work)
        chunk = Chunk(models, np.zeros_like(out), out, 0, context, Scratch(len(changes), work))
        statistic = self._method.statistic(context, **arguments)
        if statistic is not None:
            index = 0
            while index < statistic.passes:
                statistic.observe(index, chunk)
                statistic.settle(index)
                index += 1
        if statistic is not None or "statistic" in self._method.keywords:
            arguments["statistic"] = statistic
        self._method.combine(chunk, **arguments)
        return out.reshape(shape)


def _weighted(coefficients: Sequence[float]) -> Callable[[Sequence[Array]], Array]:
    def total(changes: Sequence[Array]) -> Array:
        summed = np.zeros_like(changes[0])
        for coefficient, change in zip(coefficients, changes, strict=True):
            summed += coefficient * change
        return summed

    return total


def _or_default(value: Any, parameter: Any, tensor: str) -> Any:
    if value is None and parameter.default is None:
        raise PackError(
            f"the parameter '{parameter.name}' is not set for '{tensor}'",
            f"Add it to the recipe's parameters: {parameter.summary}",
        )
    return parameter.default if value is None else value
