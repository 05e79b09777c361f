"""The merge methods, one module each; importing this package fills `METHODS`."""

from __future__ import annotations

from mergekit_lite.methods import (  # noqa: F401 - each registers itself
    dare_linear,
    dare_ties,
    linear,
    passthrough,
    slerp,
    task_arithmetic,
    ties,
)
from mergekit_lite.methods.base import (
    METHODS,
    Chunk,
    Method,
    Parameter,
    TensorContext,
    merge_method,
)

__all__ = ["ALIASES", "METHODS", "Chunk", "Method", "Parameter", "TensorContext", "merge_method"]

ALIASES = {"dare": ("dare_linear", "dare_ties")}
"""Words for a family of methods: the first is meant unless the recipe names another of them."""
