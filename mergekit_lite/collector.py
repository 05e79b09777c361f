"""Python's search for reference cycles, which finds nothing while a program starts.

Imports and plans make hundreds of thousands of objects, nearly all of which stay until the end, and
the usual search goes over them again and again: a fifth of a small merge's time. So it is put off
until work begins, and what is there by then is left out of it for good.
"""

from __future__ import annotations

import gc

__all__ = ["put_off", "resume"]

_LATE = (100_000, 50, 100)
_state: list[tuple[int, int, int]] = []


def put_off() -> None:
    """Search seldom, until `resume`."""
    if not _state:
        _state.append(gc.get_threshold())
        gc.set_threshold(*_LATE)


def resume() -> None:
    """Search as usual what is made from now on; does nothing unless it was put off."""
    if _state:
        gc.freeze()
        gc.set_threshold(*_state.pop())
