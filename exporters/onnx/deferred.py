"""Weights that are named and reshaped while a graph is built, and read when they are written.

A program that turns a model into a graph joins, splits, transposes and shifts weights on the way.
`Deferred` tensors record what it does to them and hold no values; `Deferred.read` does the same to
the values of the checkpoint later, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map

from mergekit_lite.adapters.lending import replace_parameters

__all__ = ["Deferred", "Read", "Rows", "defer", "rows_of"]

Read = Callable[[str], Any]
"""Gives the values of a parameter, float32, by its path in the model."""

_ATEN = torch.ops.aten
_SAME = tuple(getattr(_ATEN, name).default for name in ("detach", "alias", "clone", "_to_copy"))
_SHAPED = tuple(getattr(_ATEN, name).default for name in ("view", "_unsafe_view", "reshape"))


@dataclass(frozen=True)
class _Call:
    """What was done: an operation of torch, with its arguments."""

    operation: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of a parameter that is a matrix.

    Attributes:
        parameter: Its path in the model.
        begin: The first.
        end: One past the last.
    """

    parameter: str
    begin: int
    end: int


class Deferred(torch.Tensor):  # type: ignore[misc]
    """A tensor without values, and how they are had.

    Attributes:
        source: The path of a parameter, or what was done and which of the results this is.
    """

    source: str | tuple[_Call, int | None]

    @staticmethod
    def __new__(cls, like: Any, source: str | tuple[_Call, int | None]) -> Self:
        """A tensor of a shape and type."""
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 (torch's way to do this)
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device="cpu"
        )
        made.source = source
        return made

    def __repr__(self) -> str:
        return f"Deferred({list(self.shape)}, {self.source})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do it to shapes alone, and remember it."""
        kwargs = kwargs or {}
        if func is _ATEN.count_nonzero.default:
            return torch.ones((), dtype=torch.int64)  # no bias is left out for being zero
        found = func(*tree_map(_shape, args), **tree_map(_shape, {**kwargs, **_meta(kwargs)}))
        call = _Call(func, args, kwargs)
        if isinstance(found, torch.Tensor):
            return cls(found, (call, None))
        if isinstance(found, (list, tuple)):
            return type(found)(cls(part, (call, at)) for at, part in enumerate(found))
        return found

    def read(self, read: Read) -> Any:
        """Its values.

        Args:
            read: Gives those of a parameter.

        Raises:
            PackError: The checkpoint does not have one.
        """
        if isinstance(self.source, str):
            return read(self.source).to(self.dtype)
        call, at = self.source

        def values(item: Any) -> Any:
            return item.read(read) if isinstance(item, Deferred) else item

        found = call.operation(*tree_map(values, call.arguments), **tree_map(values, call.keywords))
        return found if at is None else found[at]

    def parameters(self) -> Iterator[str]:
        """Paths of the parameters that it is made of."""
        if isinstance(self.source, str):
            yield self.source
            return
        found: list[Deferred] = []
        tree_map(lambda item: found.append(item) if isinstance(item, Deferred) else None,
                 (self.source[0].arguments, self.source[0].keywords))  # fmt: skip
        for part in found:
            yield from part.parameters()


def _shape(item: Any) -> Any:
    if isinstance(item, Deferred):
        return torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device="meta")
    if isinstance(item, torch.Tensor):
        return item.to("meta")
    return item


def _meta(keywords: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("meta")} if keywords.get("device") is not None else {}


def defer(model: Any) -> None:
    """Give a model on the meta device parameters that are read later, as float32."""

    def make(parameter: Any, path: str) -> Deferred:
        kind = torch.float32 if parameter.is_floating_point() else parameter.dtype
        return Deferred(torch.empty(parameter.shape, dtype=kind, device="meta"), path)

    replace_parameters(model, make)


def rows_of(tensor: Deferred) -> Sequence[Rows] | None:
    """Which rows of which parameters a matrix ``(out, in)`` is made of, one below the other.

    None for one that is more than that.
    """
    if isinstance(tensor.source, str):
        return [Rows(tensor.source, 0, tensor.shape[0])] if tensor.ndim == 2 else None
    call, at = tensor.source
    operation, arguments = call.operation, call.arguments
    first = arguments[0]
    if operation in _SAME or (operation in _SHAPED and first.shape == tensor.shape):
        return rows_of(first)
    if _transposes(call):
        inner = first.source
        if not isinstance(inner, str) and _transposes(inner[0]):
            return rows_of(inner[0].arguments[0])
        # A layer that stores its matrix with its inputs first.
        return [Rows(inner, 0, tensor.shape[0])] if isinstance(inner, str) else None
    if operation is _ATEN.cat.default:
        parts = [rows_of(part) for part in first if isinstance(part, Deferred)]
        along = arguments[1] if len(arguments) > 1 else call.keywords.get("dim", 0)
        if along != 0 or len(parts) != len(first) or any(part is None for part in parts):
            return None
        return [rows for part in parts if part is not None for rows in part]
    if operation is _ATEN.slice.Tensor:
        _, along, begin, _ = (*arguments, *(0, None, None)[len(arguments) - 1 :])[:4]
        step = arguments[4] if len(arguments) > 4 else 1
        whole = rows_of(first)
        if along != 0 or step != 1 or whole is None:
            return None
        begin = 0 if begin is None else begin
        return _cut(whole, begin, begin + tensor.shape[0])
    if operation in (_ATEN.split.Tensor, _ATEN.split_with_sizes.default) and at is not None:
        along = arguments[2] if len(arguments) > 2 else call.keywords.get("dim", 0)
        whole = rows_of(first)
        if along != 0 or whole is None:
            return None
        sizes = arguments[1]
        begin = at * sizes if isinstance(sizes, int) else sum(sizes[:at])
        return _cut(whole, begin, begin + tensor.shape[0])
    return None


def _transposes(call: _Call) -> bool:
    """Whether it swaps the two dimensions of a matrix."""
    first = call.arguments[0]
    if not isinstance(first, torch.Tensor) or first.ndim != 2:
        return False
    if call.operation is _ATEN.transpose.int:
        return {axis % 2 for axis in call.arguments[1:3]} == {0, 1}
    if call.operation is _ATEN.permute.default:
        return [axis % 2 for axis in call.arguments[1]] == [1, 0]
    return bool(call.operation in (_ATEN.t.default, _ATEN.numpy_T.default))


def _cut(rows: Sequence[Rows], begin: int, end: int) -> list[Rows]:
    found = []
    at = 0
    for part in rows:
        size = part.end - part.begin
        first, last = max(begin - at, 0), min(end - at, size)
        if first < last:
            found.append(Rows(part.parameter, part.begin + first, part.begin + last))
        at += size
    return found
