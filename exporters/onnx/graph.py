"""A model as a graph whose weights are not there yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx_ir

    from exporters.onnx.deferred import Deferred

__all__ = ["OPSET", "PAST", "PRESENT", "Cache", "Graph", "Kind", "cache_of"]

Kind = Literal["decoder", "encoder"]
"""Whether it goes on with a cache, token by token."""

OPSET = 23
"""Of the operators; the first with attention and RMS norms among them."""

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
"""Names of what goes into and comes out of a decoder's cache, by layer and ``key`` or ``value``;
optimum's convention, which transformers.js and onnxruntime-genai follow."""


@dataclass(frozen=True)
class Graph:
    """What an export gives.

    Attributes:
        model: The graph; initializers in `deferred` have a type and a shape, and no values.
        deferred: Weights by the names of their initializers.
        kind: Of the model.
        route: Which program made it, with its version.
        notes: What the user should know.
    """

    model: onnx_ir.Model
    deferred: Mapping[str, Deferred]
    kind: Kind
    route: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cache:
    """Shapes of a decoder's cache: ``(batch, heads, tokens, size)`` for keys and for values.

    Attributes:
        layers: Number and size of heads, by layer: heads, size of keys, size of values.
    """

    layers: tuple[tuple[int, int, int], ...]


def cache_of(inputs: Mapping[str, tuple[int | str | None, ...]]) -> Cache:
    """Read the shapes of a cache from those of a graph's inputs."""
    found: list[tuple[int, int, int]] = []
    while (key := PAST.format(len(found), "key")) in inputs:
        value = inputs[PAST.format(len(found), "value")]
        heads, size = inputs[key][1], inputs[key][3]
        assert isinstance(heads, int) and isinstance(size, int)  # noqa: S101, PT018 (as exported)
        assert isinstance(value[3], int)  # noqa: S101 (as exported)
        found.append((heads, size, value[3]))
    return Cache(tuple(found))
