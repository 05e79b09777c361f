"""The one way that kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.extending import overload, register_jitable

__all__ = ["TILE", "inner", "intrinsic", "is_first_use", "kernel", "overloads"]

F = TypeVar("F", bound=Callable[..., Any])

TILE = 1024
"""Elements that a kernel takes at a time: a few such rows of float32 stay in the first cache."""


def kernel(function: F) -> F:
    """Compile a function without the interpreter's lock; kept on disk between runs."""
    try:
        return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))
    except RuntimeError:  # there is no folder that may be written to: compile in every run
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


def is_first_use() -> bool:
    """Whether no kernel has been compiled yet beside the code, so that the first run takes long."""
    folder = Path(numba.config.CACHE_DIR or Path(__file__).parent / "__pycache__")
    return not any(folder.rglob("*.nbi"))


def inner(function: F) -> F:
    """Make a function callable from kernels, compiled into them."""
    return cast(F, register_jitable(function))


def overloads(target: Callable[..., Any]) -> Callable[[F], F]:
    """Let a function choose, by the types of its arguments, what kernels call for ``target``."""
    return cast(Callable[[F], F], overload(target))


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that emits machine code itself callable from kernels."""
    return cast(Callable[..., Any], numba.extending.intrinsic(function))
