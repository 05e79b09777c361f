"""Which tensors of which models make each tensor of the result, decided from names alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mergekit_lite.checkpoint.layers import is_input_side, main_stack
from mergekit_lite.errors import PackError
from mergekit_lite.merge.inputs import Inputs, Model
from mergekit_lite.recipe import ModelEntry, Recipe, Setting, Slice, SliceSource

__all__ = ["Assignment", "Ingredient", "Notes", "assign"]

E = TypeVar("E", ModelEntry, SliceSource)
Levels = tuple[Mapping[str, Setting], ...]

_RECOMPUTED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", "embeddings.position_ids")
"""Endings of buffers that old checkpoints carry and models compute for themselves."""


@dataclass(frozen=True)
class Ingredient:
    """A tensor of an input, and what the recipe says of it.

    Attributes:
        model: The model.
        tensor: Its name there.
        levels: Parameters that hold for it, the most specific first.
    """

    model: Model
    tensor: str
    levels: Levels = ()


@dataclass(frozen=True)
class Assignment:
    """A tensor of the result.

    Attributes:
        name: Its name.
        position: Where it stands for gradients, from 0.0 to 1.0.
        models: What is merged, in canonical order.
        base: What the deltas are taken from; None where the method has no base.
        levels: Parameters that hold for the whole merge of it, the most specific first.
    """

    name: str
    position: float
    models: tuple[Ingredient, ...]
    base: Ingredient | None
    levels: Levels


@dataclass
class Notes:
    """What the user should know of decisions that were taken for them.

    Attributes:
        lines: One sentence each.
        unties: Whether the result carries an output embedding of its own where the template's
            config says that it is tied.
        layer_sources: For a stack of slices, the template's layer that each new layer comes from.
    """

    lines: list[str] = field(default_factory=list)
    unties: bool = False
    layer_sources: list[tuple[Model, int]] | None = None


def assign(
    recipe: Recipe, inputs: Inputs, needs_base: bool, symmetric: bool
) -> tuple[list[Assignment], Notes]:
    """Find the sources of every tensor of the result.

    Args:
        recipe: The recipe.
        inputs: Its models.
        needs_base: Whether the method takes deltas from a base.
        symmetric: Whether the order of models means nothing, so that they are sorted.

    Raises:
        PackError: Tensors are missing, or layers cannot be told apart.
    """
    notes = Notes()
    base = inputs[recipe.base_model] if needs_base and recipe.base_model else None
    if recipe.models is not None:
        entries = [e for e in recipe.models if base is None or e.model != base.name]
        return _whole(_ordered(entries, symmetric), recipe, inputs, base, notes), notes
    return _stacked(recipe, inputs, base, symmetric, notes), notes


def _ordered(entries: Sequence[E], symmetric: bool) -> list[E]:
    if not symmetric:
        return list(entries)
    return sorted(entries, key=lambda e: (e.model, repr(sorted(e.settings().items()))))


def _whole(
    entries: Sequence[ModelEntry], recipe: Recipe, inputs: Inputs, base: Model | None, notes: Notes
) -> list[Assignment]:
    """Every tensor from the tensor of the same name in all models."""
    taking_part = {e.model: inputs[e.model] for e in entries} | ({base.name: base} if base else {})
    shared = (recipe.settings(),)
    stated = [(inputs[e.model], (e.settings(), *shared)) for e in entries]
    result: list[Assignment] = []
    missing: list[str] = []
    for name in _output_names(list(taking_part.values()), inputs.template, notes, missing):
        like = next(m.checkpoint.spec(name) for m in taking_part.values() if m.find(name))
        found = {model.name: model.find(name, like) for model in taking_part.values()}
        ingredients = tuple(
            Ingredient(model, found[model.name] or name, levels) for model, levels in stated
        )
        result.append(
            Assignment(
                name,
                inputs.template.layers.position(name),
                ingredients,
                Ingredient(base, found[base.name] or name) if base else None,
                shared,
            )
        )
    if missing:
        shown = "\n".join(f"  {line}" for line in missing[:10])
        more = f"\n  … and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise PackError(
            f"the models do not have the same tensors:\n{shown}{more}",
            "Merge models of one architecture; see: pack plan",
        )
    return result


def _output_names(
    models: Sequence[Model], template: Model, notes: Notes, missing: list[str]
) -> Iterator[str]:
    """Names of the result's tensors; what lacks a source goes to ``missing``."""
    every = sorted({name for model in models for name in model.checkpoint.names()})
    left_out: dict[str, list[str]] = {}
    for name in every:
        having = [m for m in models if m.find(name)]
        like = having[0].checkpoint.spec(name)
        if _is_tied_copy(name, having):
            notes.lines.append(f"'{name}' is left out: the configs say that it is tied")
            continue
        lacking = [m for m in models if m.find(name, like) is None]
        if not lacking:
            if len(having) < len(models):
                tied = ", ".join(m.name for m in models if m not in having)
                notes.lines.append(f"'{name}' is tied to the input embedding in {tied}")
            notes.unties |= template not in having
            yield name
        elif name.endswith(_RECOMPUTED):
            notes.lines.append(f"'{name}' is left out: models compute it themselves")
        elif template in lacking or template.find(name) is None:
            left_out.setdefault(", ".join(m.name for m in having), []).append(name)
        else:
            missing.append(f"{', '.join(m.name for m in lacking)}: has no '{name}'")
    for owners, names in left_out.items():
        shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        notes.lines.append(f"{len(names)} tensor(s) left out that only {owners} has: {shown}")


def _is_tied_copy(name: str, having: Sequence[Model]) -> bool:
    """Whether a tensor is a second copy of an embedding, which every config says is tied."""
    if is_input_side(name) or not all(m.ties_embeddings for m in having):
        return False
    if any(name in m.layers.layers for m in having):
        return False
    shape = having[0].checkpoint.spec(name).shape
    return len(shape) == 2 and all(
        any(
            is_input_side(other) and m.checkpoint.spec(other).shape == shape
            for other in m.checkpoint.names()
            if other not in m.layers.layers
        )
        for m in having
    )


def _stacked(
    recipe: Recipe, inputs: Inputs, base: Model | None, symmetric: bool, notes: Notes
) -> list[Assignment]:
    """Layers from slices; what embeds from the first slice, everything else from the last."""
    slices = recipe.slices or []
    result: list[Assignment] = []
    prefix = main_stack(inputs.template.layers, inputs.template.name)
    at = 0
    layer_sources: list[tuple[Model, int]] = []
    for part in slices:
        _check_ranges(part, inputs)
        count = part.sources[0].layer_range[1] - part.sources[0].layer_range[0]
        for k in range(count):
            position = k / (count - 1) if count > 1 else 0.0
            result += _layer(part, recipe, inputs, base, symmetric, (prefix, at, k, position))
            lead = part.sources[0]
            layer_sources.append((inputs[lead.model], lead.layer_range[0] + k))
            at += 1
    for name in inputs.template.checkpoint.names():
        layer = inputs.template.layers.layers.get(name)
        if layer is None or layer.prefix != prefix:
            first = layer is None and is_input_side(name)
            part = slices[0] if first else slices[-1]
            sources = [(source, name) for source in part.sources if inputs[source.model].find(name)]
            if not sources:
                raise PackError(
                    f"none of the models of the {'first' if first else 'last'} slice has '{name}'",
                    "Merge models of one architecture.",
                )
            result.append(
                _assignment(
                    name, 0.0 if first else 1.0, sources, part, recipe, base,
                    name if base and base.find(name) else None, inputs, symmetric,
                )
            )  # fmt: skip
    notes.layer_sources = layer_sources
    return sorted(result, key=lambda a: a.name)


def _check_ranges(part: Slice, inputs: Inputs) -> None:
    for source in part.sources:
        model = inputs[source.model]
        count = model.layers.counts[main_stack(model.layers, model.name)]
        if source.layer_range[1] > count:
            raise PackError(
                f"{source.model}: layer_range {source.layer_range} goes beyond its {count} layers",
                f"Use a range within [0, {count}].",
            )


def _layer(
    part: Slice,
    recipe: Recipe,
    inputs: Inputs,
    base: Model | None,
    symmetric: bool,
    place: tuple[str, int, int, float],
) -> Iterator[Assignment]:
    """The tensors of one new layer."""
    prefix, at, k, position = place
    lead = inputs[part.sources[0].model]
    lead_prefix = main_stack(lead.layers, lead.name)
    number = part.sources[0].layer_range[0] + k
    rests = [
        layer.rest
        for layer in lead.layers.layers.values()
        if layer.prefix == lead_prefix and layer.index == number
    ]
    for rest in rests:
        sources = []
        for source in part.sources:
            model = inputs[source.model]
            tensor = f"{main_stack(model.layers, model.name)}{source.layer_range[0] + k}{rest}"
            if not model.find(tensor):
                raise PackError(
                    f"{source.model}: has no '{tensor}'", "Merge models of one architecture."
                )
            sources.append((source, tensor))
        base_tensor = None
        if base is not None:
            own = [s for s in part.sources if s.model == base.name]
            starts = {s.layer_range[0] for s in own or part.sources}
            if len(starts) != 1:
                raise PackError(
                    f"cannot tell which layers of {base.name} belong to a slice",
                    "List the base model among the sources of the slice.",
                )
            base_tensor = f"{main_stack(base.layers, base.name)}{starts.pop() + k}{rest}"
        yield _assignment(
            f"{prefix}{at}{rest}",
            position,
            sources,
            part,
            recipe,
            base,
            base_tensor,
            inputs,
            symmetric,
        )


def _assignment(
    name: str,
    position: float,
    sources: Sequence[tuple[SliceSource, str]],
    part: Slice,
    recipe: Recipe,
    base: Model | None,
    base_tensor: str | None,
    inputs: Inputs,
    symmetric: bool,
) -> Assignment:
    shared = (part.settings(), recipe.settings())
    tensors = {id(source): tensor for source, tensor in sources}
    if base is not None and (base_tensor is None or not base.find(base_tensor)):
        raise PackError(
            f"{base.name}: has no '{base_tensor or name}'", "Choose another base_model."
        )
    entries = _ordered(
        [source for source, _ in sources if base is None or source.model != base.name], symmetric
    )
    return Assignment(
        name,
        position,
        tuple(
            Ingredient(inputs[s.model], tensors[id(s)], (s.settings(), *shared)) for s in entries
        ),
        Ingredient(base, base_tensor) if base is not None and base_tensor else None,
        shared,
    )
