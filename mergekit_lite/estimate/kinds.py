"""Tensors of a plan by what they cost.

A *kind* is all tensors that cost the same for each element: method, number of models, types,
parameters up to their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mergekit_lite.dtypes import DTYPES
from mergekit_lite.kernels.cast import in_kernel
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.merge.plan import Plan, PlannedTensor, scratch_bytes

__all__ = ["Kind", "Kinds", "budget_of", "kinds_of"]

_FIXED = 64 * 10**6


@dataclass(frozen=True)
class Kind:
    """Tensors of a plan that cost the same for each element.

    Attributes:
        signature: What they have in common, in words.
        example: One of them, of the size that half of the elements lie in tensors of or below.
        sources: Types of its models, then of its base, as their readers give them.
        elements: Of all of them.
        kept: Whether their rows are held between the passes.
    """

    signature: str
    example: PlannedTensor
    sources: tuple[str, ...]
    elements: int
    kept: bool


@dataclass(frozen=True)
class Kinds:
    """A plan's tensors by kind.

    Attributes:
        plan: Whose.
        inputs: Its models.
        kinds: By signature; that of most elements first.
        of: Signature by a tensor's name; tensors without elements have none.
    """

    plan: Plan
    inputs: Inputs
    kinds: Mapping[str, Kind]
    of: Mapping[str, str]


def budget_of(plan: Plan, memory: int, threads: int) -> int:
    """Bytes that a run with so much memory may hold between the passes of its tensors."""
    return max(0, memory - _FIXED - scratch_bytes(plan, threads))


def kinds_of(plan: Plan, inputs: Inputs, memory: int) -> Kinds:
    """Sort a plan's tensors into kinds; the kind of most elements comes first.

    Tensors without elements are of no kind: there is nothing of them to measure.

    Args:
        plan: Any plan.
        inputs: Its models.
        memory: Bytes that may be held between the passes of a tensor.
    """
    groups: dict[_Look, list[PlannedTensor]] = {}
    for tensor in plan.tensors.values():
        if not tensor.spec.elements:
            continue
        groups.setdefault(_look(plan, inputs, memory, tensor), []).append(tensor)
    kinds: dict[str, Kind] = {}
    of: dict[str, str] = {}
    signed: dict[str, list[PlannedTensor]] = {}
    for look, members in groups.items():
        signature = _signature(plan, look, members[0])
        together = signed.setdefault(signature, [])
        together += members
        of |= dict.fromkeys((tensor.name for tensor in members), signature)
        elements = sum(t.spec.elements for t in together)
        example = _middle(together, elements)
        kinds[signature] = Kind(signature, example, look.sources, elements, look.kept)
    ordered = sorted(kinds.items(), key=lambda item: -item[1].elements)
    return Kinds(plan, inputs, dict(ordered), of)


def _middle(members: Sequence[PlannedTensor], elements: int) -> PlannedTensor:
    seen = 0
    for tensor in sorted(members, key=lambda t: t.spec.elements):
        seen += tensor.spec.elements
        if 2 * seen >= elements:
            return tensor
    return members[-1]


class _Look(NamedTuple):
    """What tells tensors of different kinds apart, parameters to the last digit."""

    method: str
    models: int
    sources: tuple[str, ...]
    written: str
    parameters: tuple[object, ...]
    kept: bool


def _look(plan: Plan, inputs: Inputs, memory: int, tensor: PlannedTensor) -> _Look:
    sources = tuple(inputs[m].checkpoint.spec(name).dtype.name for m, name in tensor.sources)
    first = DTYPES[sources[0]]
    native = len(set(sources)) == 1 and in_kernel(first)
    width = first.itemsize if native else plan.work.itemsize
    return _Look(
        tensor.method,
        len(tensor.models),
        sources,
        tensor.spec.dtype.name,
        tuple(tensor.parameters.values()),
        kept=tensor.spec.elements * len(sources) * width <= memory,
    )


def _signature(plan: Plan, look: _Look, tensor: PlannedTensor) -> str:
    if look.method == "copy":
        return f"copy {look.sources[0]}"
    models = f"{look.models} models" + (" and a base" if tensor.base else "")
    types = "+".join(dict.fromkeys(look.sources))
    words = [
        f"{look.method}, {models}, {types} to {look.written} in {plan.work.name}",
        *(f"{name}={_size(value)}" for name, value in tensor.parameters.items()),
    ]
    return " ".join(words) + ("" if look.kept else ", read again for each pass")


def _size(value: object) -> str:
    """A parameter without its exact value: only 0 and 1 may cost less than what lies between."""
    if isinstance(value, tuple):
        return "/".join(dict.fromkeys(map(_size, value)))
    if isinstance(value, float):
        return f"{value:g}" if value in (0.0, 1.0) else "x"
    return str(value).lower()
