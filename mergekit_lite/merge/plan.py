"""What will be computed, from headers, configs and the recipe alone: plain data, no weight read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import mergekit_lite
from mergekit_lite.checkpoint.header import Header, write_header
from mergekit_lite.checkpoint.protocol import CHUNK_ELEMENTS, TensorSpec
from mergekit_lite.dtypes import DType, by_config_name
from mergekit_lite.errors import PackError
from mergekit_lite.merge.assign import Assignment, Ingredient, Notes, assign
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.methods import METHODS, Method
from mergekit_lite.recipe import ModelEntry, Recipe, SliceSource, Value
from mergekit_lite.recipe.parameters import Parameter, first_set

__all__ = ["Plan", "PlannedTensor", "Shard", "lay_out", "make_plan"]

FORMAT = 2
"""Raised whenever the same recipe begins to give other bytes; part of a plan's fingerprint."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result.

    Attributes:
        name: Its name.
        spec: Shape and dtype as written.
        method: Name of the merge method, or ``copy`` for what is not averaged.
        models: Model and tensor name of each thing that is merged, in canonical order.
        base: Model and tensor name of the base; None where there is none.
        parameters: Resolved values by recipe name; a tuple where each model has its own.
    """

    name: str
    spec: TensorSpec
    method: str
    models: tuple[tuple[str, str], ...]
    base: tuple[str, str] | None
    parameters: Mapping[str, Value | tuple[Value, ...]]

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Everything that is read: the models, then the base."""
        return self.models + ((self.base,) if self.base else ())


@dataclass(frozen=True)
class Shard:
    """One output file: its name, the bytes that begin it, and where its tensors lie."""

    name: str
    prefix: bytes
    header: Header

    @property
    def size(self) -> int:
        """Size of the file, in bytes."""
        return max((entry.end for entry in self.header.entries.values()), default=len(self.prefix))


@dataclass(frozen=True)
class Plan:
    """A whole merge.

    Attributes:
        recipe: What the user asked for.
        method: The merge method.
        tensors: By name, in the order in which they are written.
        shards: Output files.
        template: Model whose config the result takes.
        work: The working type, float32 or float64.
        notes: Decisions that the user should know of.
    """

    recipe: Recipe
    method: Method
    tensors: Mapping[str, PlannedTensor]
    shards: tuple[Shard, ...]
    template: str
    work: np.dtype[Any]
    notes: Notes

    @property
    def output_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def passes(self) -> int:
        """How often every source is gone through, at most."""
        merged = [t for t in self.tensors.values() if t.method == self.method.name]
        spans = merged and self.method.spans_model(merged[0].parameters)  # type: ignore[arg-type]
        return 1 + self.work.itemsize // 2 if spans else 1

    def input_bytes(self, inputs: Inputs) -> int:
        """Bytes of tensors that are read once."""
        return sum(
            inputs[model].checkpoint.spec(name).nbytes
            for tensor in self.tensors.values()
            for model, name in tensor.sources
        )

    def fingerprint(self, inputs: Inputs) -> str:
        """What a half-written result must agree with to be continued: recipe, inputs, layout."""
        parts = [
            f"format {FORMAT}, pack {mergekit_lite.__version__}",
            json.dumps(self.describe(), sort_keys=True),
            *(f"{name}: {model.checkpoint.fingerprint()}" for name, model in inputs.items()),
            *(f"{s.name} {hashlib.sha256(s.prefix).hexdigest()}" for s in self.shards),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The plan as data for JSON."""
        return {
            "name": self.recipe.name,
            "merge_method": self.method.name,
            "seed": self.recipe.seed,
            "work_dtype": self.work.name,
            "template": self.template,
            "notes": list(self.notes.lines),
            "shards": [{"name": s.name, "bytes": s.size} for s in self.shards],
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.spec.dtype.name,
                    "shape": list(t.spec.shape),
                    "method": t.method,
                    "models": [list(pair) for pair in t.models],
                    "base": list(t.base) if t.base else None,
                    "parameters": {
                        k: list(v) if isinstance(v, tuple) else v for k, v in t.parameters.items()
                    },
                }
                for t in self.tensors.values()
            ],
        }


def make_plan(recipe: Recipe, inputs: Inputs, shard_bytes: int) -> Plan:
    """Plan a merge.

    Args:
        recipe: A checked recipe.
        inputs: Its models, opened.
        shard_bytes: Most data bytes of an output file that holds more than one tensor.

    Raises:
        PackError: Tensors are missing, shapes do not fit, a parameter that must be given is not.
    """
    method = METHODS[recipe.merge_method]
    assignments, notes = assign(recipe, inputs, method.base, method.symmetric)
    notes.lines += _without_effect(recipe, [a.name for a in assignments], method.base)
    saved = by_config_name(recipe.out_dtype or recipe.dtype or "")
    _check_shapes(assignments)
    planned = [_plan_tensor(a, method, inputs, saved) for a in assignments]
    # Large types first, as the safetensors library does, so that every tensor is aligned.
    planned.sort(key=lambda t: (-t.spec.dtype.itemsize, t.name))
    _check_spanning(method, planned)
    work = np.dtype(np.float64 if recipe.dtype == "float64" else np.float32)
    return Plan(
        recipe=recipe,
        method=method,
        tensors={t.name: t for t in planned},
        shards=tuple(lay_out([(t.name, t.spec) for t in planned], shard_bytes)),
        template=inputs.template.name,
        work=work,
        notes=notes,
    )


def _without_effect(recipe: Recipe, names: Sequence[str], has_base: bool) -> list[str]:
    """What the recipe says and what changes nothing: filters that fit no tensor, among others."""
    entries: list[ModelEntry | SliceSource] = [*(recipe.models or [])]
    entries += [source for part in recipe.slices or [] for source in part.sources]
    lines = []
    if has_base and any(e.model == recipe.base_model and e.settings() for e in entries):
        lines.append(f"parameters of the base model {recipe.base_model} have no effect")
    sections = [recipe, *(recipe.slices or []), *entries]
    filters = {
        part: name
        for section in sections
        for name, setting in section.settings().items()
        for part, _ in setting.branches
        if part is not None and part != "*"
    }
    for part, parameter in sorted(filters.items()):
        if not any(part in name for name in names):
            lines.append(f"the filter '{part}' of '{parameter}' fits no tensor")
    return lines


def _plan_tensor(
    assignment: Assignment, method: Method, inputs: Inputs, saved: DType | None
) -> PlannedTensor:
    every = [*assignment.models, *([assignment.base] if assignment.base else [])]
    specs = [i.model.checkpoint.spec(i.tensor) for i in every]
    lead = _lead(every, inputs)
    spec = lead.model.checkpoint.spec(lead.tensor)
    kept = lead.model.checkpoint.kept_dtype(lead.tensor)
    if not all(s.dtype.is_float for s in specs):
        return PlannedTensor(
            assignment.name, spec, "copy", ((lead.model.name, lead.tensor),), None, {}
        )
    low, high = method.models
    if len(assignment.models) < low or (high is not None and len(assignment.models) > high):
        raise PackError(
            f"'{assignment.name}': '{method.name}' would get {len(assignment.models)} models",
            "Check the sources of the slices.",
        )
    parameters = _resolve(assignment, method)
    try:
        method.check(parameters)
    except PackError as error:
        raise PackError(f"'{assignment.name}': {error.message}", error.hint) from None
    return PlannedTensor(
        name=assignment.name,
        spec=TensorSpec(spec.shape, saved or kept),
        method=method.name,
        models=tuple((i.model.name, i.tensor) for i in assignment.models),
        base=(assignment.base.model.name, assignment.base.tensor) if assignment.base else None,
        parameters=parameters,
    )


def _lead(every: Sequence[Ingredient], inputs: Inputs) -> Ingredient:
    """The ingredient whose type the result keeps: the template's, where it takes part."""
    return next((i for i in every if i.model is inputs.template), every[0])


def _resolve(assignment: Assignment, method: Method) -> dict[str, Value | tuple[Value, ...]]:
    values: dict[str, Value | tuple[Value, ...]] = {}
    for parameter in method.parameters.values():
        if parameter.each:
            values[parameter.name] = tuple(
                _value(parameter, i.levels, assignment, method) for i in assignment.models
            )
        else:
            values[parameter.name] = _value(parameter, assignment.levels, assignment, method)
    return values


def _value(
    parameter: Parameter,
    levels: Sequence[Mapping[str, Any]],
    assignment: Assignment,
    method: Method,
) -> Value:
    value = first_set(levels, parameter.name, assignment.name, assignment.position)
    if value is not None:
        return value
    if parameter.default is None:
        raise PackError(
            f"'{method.name}' needs the parameter '{parameter.name}', which is not set for "
            f"'{assignment.name}'",
            f"Add it to the recipe's parameters: {parameter.summary}",
        )
    return parameter.default


def _check_shapes(assignments: Sequence[Assignment]) -> None:
    """Report every tensor whose shape differs between models, before any weight is read."""
    wrong = []
    vocabulary = False
    for a in assignments:
        every = [*a.models, *([a.base] if a.base else [])]
        shapes: dict[tuple[int, ...], list[str]] = {}
        for i in every:
            shapes.setdefault(i.model.checkpoint.spec(i.tensor).shape, []).append(i.model.name)
        if len(shapes) > 1:
            said = ", ".join(
                f"{list(s)} in {' and '.join(dict.fromkeys(m))}" for s, m in shapes.items()
            )
            wrong.append(f"  {a.name}: {said}")
            tails = {shape[1:] for shape in shapes}
            layers = every[0].model.layers.layers
            vocabulary |= len(tails) == 1 and tails != {()} and every[0].tensor not in layers
    if wrong:
        more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise PackError(
            f"{len(wrong)} tensor(s) differ in shape:\n" + "\n".join(wrong[:10]) + more,
            "Their vocabularies differ. Resize the embeddings to one vocabulary first; "
            "pack does not cut or remap them."
            if vocabulary
            else "Merge models of one architecture and size.",
        )


def _check_spanning(method: Method, planned: Sequence[PlannedTensor]) -> None:
    """A statistic over the whole model needs one value of each parameter for the whole model."""
    merged = [t for t in planned if t.method == method.name]
    if not any(method.spans_model(t.parameters) for t in merged):  # type: ignore[arg-type]
        return
    for t in merged[1:]:
        # The weight, and what is applied after the statistic, may still vary.
        for name in ("density", "trim"):
            if t.parameters.get(name) != merged[0].parameters.get(name):
                raise PackError(
                    f"'{name}' differs between tensors, while 'trim: global' trims the whole model",
                    f"Give one '{name}' for all tensors, or set 'trim: tensor'.",
                )
    if len({tuple(m for m, _ in t.models) for t in merged}) > 1:
        raise PackError(
            "'trim: global' needs the same models for every tensor", "Set 'trim: tensor'."
        )


def lay_out(tensors: Sequence[tuple[str, TensorSpec]], shard_bytes: int) -> Iterator[Shard]:
    """Put tensors into safetensors files, in the given order.

    Args:
        tensors: Names, with shape and dtype as they are written.
        shard_bytes: Most data bytes of a file that holds more than one tensor.
    """
    groups: list[list[tuple[str, TensorSpec]]] = [[]]
    held = 0
    for name, spec in tensors:
        if groups[-1] and held + spec.nbytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append((name, spec))
        held += spec.nbytes
    for number, group in enumerate(groups, 1):
        name = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        prefix, header = write_header(
            ((name, spec.dtype, spec.shape) for name, spec in group), {"format": "pt"}
        )
        yield Shard(name, prefix, header)


def scratch_bytes(plan: Plan, threads: int) -> int:
    """Upper estimate of the chunk buffers of all threads, in bytes."""
    widest = max((len(t.sources) for t in plan.tensors.values()), default=1)
    return threads * CHUNK_ELEMENTS * plan.work.itemsize * (widest + 2)
