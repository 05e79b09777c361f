"""A model as a graph whose weights are not there yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lite.errors import PackError

if TYPE_CHECKING:
    import onnx_ir

    from exporters.onnx.deferred import Deferred

__all__ = ["OPSET", "PAST", "PRESENT", "Cache", "Graph", "Kind", "cache_of", "leave_unset"]

Kind = Literal["decoder", "encoder"]
"""Whether it goes on with a cache, token by token."""

OPSET = 23
"""Of the operators; the first with attention and RMS norms among them."""

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
"""Names of what goes into and comes out of a decoder's cache, by layer and ``key`` or ``value``;
optimum's convention, which transformers.js and onnxruntime-genai follow."""


_RANK = 4


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


def cache_of(
    inputs: Mapping[str, tuple[int | str | None, ...]],
    stated: tuple[int | None, int | None] = (None, None),
) -> Cache:
    """Read the shapes of a cache from those of a graph's inputs.

    Args:
        inputs: Shapes by name; symbols are strings.
        stated: Number and size of heads, for a graph that leaves them open.

    Raises:
        PackError: Nobody says them.
    """
    found: list[tuple[int, int, int]] = []
    while (key := PAST.format(len(found), "key")) in inputs:
        value = inputs.get(PAST.format(len(found), "value"), ())
        if len(inputs[key]) != _RANK or len(value) != _RANK:
            raise PackError(
                f"'{key}' is no cache of keys beside one of values with {_RANK} dimensions",
                "Graphs with such a cache are run.",
            )
        sizes = [inputs[key][1], inputs[key][3], value[3]]
        known = [
            size if isinstance(size, int) else other
            for size, other in zip(sizes, (stated[0], stated[1], stated[1]), strict=True)
        ]
        heads, keys, values = known
        if heads is None or keys is None or values is None:
            raise PackError(
                f"the graph does not say how large '{key}' is", "Put its config.json beside it."
            )
        found.append((heads, keys, values))
    return Cache(tuple(found))


def leave_unset(value: onnx_ir.Value) -> None:
    """Make an initializer out of a value with a name, a type and a shape: one without content."""
    import onnx_ir

    value.const_value = onnx_ir.LazyTensor(
        _absent, dtype=value.dtype, shape=value.shape, name=value.name
    )  # type: ignore[arg-type, unused-ignore]


def _absent() -> Any:
    raise AssertionError("the content of a weight was asked for before it was written")
