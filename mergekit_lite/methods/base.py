"""What a merge method is: a function over one chunk, whose typed signature is its schema.

A method takes a `Chunk` and, keyword-only, its parameters. A parameter annotated `Each[...]` may
differ from model to model and arrives as an array with one value per model; any other belongs to
the whole merge. Every parameter may differ from tensor to tensor. The recipe's schema, ``pack
methods`` and the documentation are all derived from the signature.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.jit import TILE
from mergekit_lite.kernels.random import WORDS
from mergekit_lite.recipe.parameters import Between, Parameter, Value

__all__ = [
    "METHODS",
    "Between",
    "Chunk",
    "Each",
    "Method",
    "Parameter",
    "Statistic",
    "TensorContext",
    "Value",
    "merge_method",
]

T = TypeVar("T")


class _PerModel:
    """Marks a parameter with one value per model."""


Each = Annotated[T, _PerModel]
"""A parameter that has one value per model; the method gets them as an array ``(n,)``."""


@dataclass(frozen=True)
class TensorContext:
    """What a method may know of a tensor, or of the whole model, before it sees any element.

    Attributes:
        elements: Number of elements; of all merged tensors, where a statistic spans the model.
        block: Elements that are summed together, see `TensorSpec.block_rows`.
        columns: Elements in a row of the matrix view.
        models: How many models are merged, the base not counted.
        work: The working type, float32 or float64.
        keys: ``(models,)`` uint64, keys of the models' random streams for this tensor.
    """

    elements: int
    block: int
    columns: int
    models: int
    work: np.dtype[Any]
    keys: Array


class Scratch:
    """Buffers of one thread that kernels work in."""

    def __init__(self, models: int, work: np.dtype[Any]) -> None:
        self.floats = np.empty((models + 4, TILE), work)
        self.words = np.empty(WORDS, np.uint32)


@dataclass(frozen=True)
class Chunk:
    """Some rows of one tensor from all models.

    Attributes:
        models: ``(n, m)`` as stored, or of the working type.
        base: ``(m,)``, likewise; None where the merge has no base.
        out: ``(m,)``, to be written, likewise; empty while statistics are gathered.
        first: Flat index in the tensor of the first element.
        tensor: What is known of the whole tensor.
        scratch: Buffers of this thread.
    """

    models: Array
    base: Array | None
    out: Array
    first: int
    tensor: TensorContext
    scratch: Scratch

    @property
    def origin(self) -> Array:
        """The base, of a method that requires one."""
        assert self.base is not None  # noqa: S101 - the planner has checked it
        return self.base


class Statistic:
    """What a method must know of all elements before it can combine any: norms, thresholds.

    `observe` is called for every chunk in each of ``passes`` passes, in any order and by several
    threads; `settle` once after each pass.
    """

    passes: int = 0

    def observe(self, index: int, chunk: Chunk) -> None:
        """See one chunk in pass ``index``."""

    def settle(self, index: int) -> None:
        """Finish pass ``index``."""


@dataclass(frozen=True)
class Method:
    """A merge method and all that is known about it.

    Attributes:
        name: As in a recipe.
        combine: Computes a chunk's ``out``.
        parameters: By their name in a recipe.
        base: Whether a base model is required.
        symmetric: Whether the order of the models means nothing.
        models: Smallest and largest number of models beside the base; no upper limit if None.
        statistic: Makes the statistic of one tensor, or None where none is needed.
        spans_model: Whether, with these parameters, one statistic covers the whole model.
        check: Raises a `PackError` where resolved parameters cannot be used together.
        summary: One sentence for ``pack methods``.
        formula: One line.
        paper: Where it comes from.
    """

    name: str
    combine: Callable[..., None]
    parameters: Mapping[str, Parameter]
    base: bool
    symmetric: bool
    models: tuple[int, int | None]
    statistic: Callable[..., Statistic | None]
    spans_model: Callable[[Mapping[str, Value]], bool]
    check: Callable[[Mapping[str, Any]], None]
    summary: str
    formula: str
    paper: str

    @property
    def keywords(self) -> frozenset[str]:
        """Names of the arguments that the function takes beside the chunk."""
        return frozenset(inspect.signature(self.combine).parameters) - {"chunk"}


METHODS: dict[str, Method] = {}
"""Every method by name; filled by importing `mergekit_lite.methods`."""


def _no_statistic(_tensor: TensorContext, **_parameters: Any) -> None:
    return None


def merge_method(
    name: str,
    *,
    formula: str,
    paper: str,
    base: bool = False,
    symmetric: bool = True,
    models: tuple[int, int | None] = (1, None),
    statistic: Callable[..., Statistic | None] = _no_statistic,
    spans_model: Callable[[Mapping[str, Value]], bool] = lambda _: False,
    check: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a method under a name; its first docstring line is its summary.

    Args:
        name: As in a recipe.
        formula: One line that says what is computed.
        paper: Where it comes from.
        base: Whether a base model is required.
        symmetric: Whether the order of the models means nothing.
        models: Smallest and largest number of models beside the base.
        statistic: Called with a `TensorContext` and the method's parameters.
        spans_model: Told the parameters, says whether one statistic covers the whole model.
        check: Raises a `PackError` where resolved parameters cannot be used together; called
            before any weight is read.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        METHODS[name] = Method(
            name=name,
            combine=function,
            parameters=_signature(function),
            base=base,
            symmetric=symmetric,
            models=models,
            statistic=statistic,
            spans_model=spans_model,
            check=check,
            summary=(function.__doc__ or "").strip().splitlines()[0],
            formula=formula,
            paper=paper,
        )
        return function

    return register


def _signature(function: Callable[..., None]) -> dict[str, Parameter]:
    hints = get_type_hints(function, include_extras=True)
    described = dict(re.findall(r"^ +(\w+): (.+)$", function.__doc__ or "", re.MULTILINE))
    found = {}
    for argument, declared in inspect.signature(function).parameters.items():
        if declared.kind is not inspect.Parameter.KEYWORD_ONLY or argument == "statistic":
            continue
        name = argument.rstrip("_")
        default = None if declared.default is inspect.Parameter.empty else declared.default
        found[name] = _parameter(
            name, argument, hints[argument], default, described.get(argument, "")
        )
    return found


def _parameter(
    name: str, argument: str, hint: Any, default: Value | None, summary: str
) -> Parameter:
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        marks = tuple(rest)
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = tuple(w for part in parts if get_origin(part) is Literal for w in get_args(part))
    kind: Literal["float", "bool", "choice"] = (
        "bool" if bool in parts else "float" if float in parts else "choice"
    )
    bounds = next((mark for mark in marks if isinstance(mark, Between)), None)
    return Parameter(name, argument, kind, default, _PerModel in marks, choices, bounds, summary)
