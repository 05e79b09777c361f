"""Telling files in which order tensors will be read, before the first of them is.

For a file on this disk that means nothing: the system reads ahead. One that is far away is fetched
in that order, in requests that span neighbouring tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar

__all__ = ["announce", "is_announcing", "turn"]

_TURN: ContextVar[int | None] = ContextVar("turn", default=None)
_ENDS: ContextVar[list[Callable[[], None]] | None] = ContextVar("ends", default=None)


def announce(prefetch: Callable[[str], None], names: Iterable[str]) -> None:
    """Say which tensors will be read, in their order; what was said before is void.

    Args:
        prefetch: Of the checkpoint that will be asked for them.
        names: Of its tensors.
    """
    ends: list[Callable[[], None]] = []
    outer = _ENDS.set(ends)
    try:
        for at, name in enumerate(names):
            token = _TURN.set(at)
            try:
                prefetch(name)
            finally:
                _TURN.reset(token)
    finally:
        _ENDS.reset(outer)
    for end in ends:
        end()


def is_announcing() -> bool:
    """Whether what is prefetched now is only said to be read later."""
    return _TURN.get() is not None


def turn(then: Callable[[], None]) -> int | None:
    """When the tensor that is prefetched now will be read; None for: soon.

    Args:
        then: Called once when all are known; the same for one file.
    """
    at = _TURN.get()
    ends = _ENDS.get()
    if at is not None and ends is not None and then not in ends:
        ends.append(then)
    return at
