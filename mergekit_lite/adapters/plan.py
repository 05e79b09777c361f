"""What an adapter changes, as plain data: decided from headers and its config, no weight read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mergekit_lite.adapters.edits import (
    AddedBias,
    Computed,
    Edit,
    Factors,
    LowRank,
    Replaced,
    ReplacedRows,
)
from mergekit_lite.adapters.tensors import AdapterTensors, read_float
from mergekit_lite.checkpoint.protocol import Checkpoint, TensorSpec
from mergekit_lite.dtypes import Array

__all__ = [
    "AdapterPlan",
    "BiasAdded",
    "ConvAdded",
    "LowRankAdded",
    "PlannedEdit",
    "Residual",
    "RowsSet",
    "WholeSet",
    "bind",
]


@dataclass(frozen=True)
class LowRankAdded:
    """LoRA, and DoRA where there is a magnitude, which belongs to the rows or to the columns."""

    factors: Factors
    magnitude: str | None = None
    along: Literal["rows", "columns"] = "rows"


@dataclass(frozen=True)
class ConvAdded:
    """LoRA on a convolution, ``(out, in, …)``: A is ``(rank, in, …)``, B ``(out, rank, 1, …)``."""

    a: str
    b: str
    scale: float
    magnitude: str | None = None


@dataclass(frozen=True)
class Residual:
    """What initialising from the base took away from it, where that can be computed again.

    PiSSA (arXiv 2404.02948, equation 5) takes the ``rank`` largest singular components; OLoRA
    (arXiv 2406.01775) ``scale`` times the first ``rank`` columns of Q and rows of R.
    """

    kind: Literal["pissa", "olora"]
    rank: int
    scale: float
    transposed: bool


@dataclass(frozen=True)
class BiasAdded:
    """The bias of the second factor."""

    name: str
    scale: float


@dataclass(frozen=True)
class WholeSet:
    """A tensor that the adapter carries whole."""

    name: str


@dataclass(frozen=True)
class RowsSet:
    """Rows of an embedding that the adapter carries."""

    name: str
    indices: tuple[int, ...]


PlannedEdit = LowRankAdded | ConvAdded | Residual | BiasAdded | WholeSet | RowsSet


@dataclass(frozen=True)
class AdapterPlan:
    """All that an adapter changes.

    Attributes:
        edits: By name of the tensor in the result, in the order in which they are applied.
        copied: Tensors that the result has and the base has not, because the base keeps one for
            two: the name in the result, and that of the base's tensor that it begins as.
        added: Tensors that the base has not at all, by name.
        notes: What the user should know.
    """

    edits: Mapping[str, tuple[PlannedEdit, ...]]
    copied: Mapping[str, str]
    added: Mapping[str, TensorSpec]
    notes: tuple[str, ...] = ()


def bind(
    planned: PlannedEdit,
    tensors: AdapterTensors,
    base: Checkpoint,
    origin: str,
    work: np.dtype[Any],
) -> Edit:
    """Make a planned edit able to run.

    Args:
        planned: What to do.
        tensors: Of the adapter.
        base: The base.
        origin: Name of the base's tensor that is changed.
        work: The working type.
    """
    if isinstance(planned, WholeSet):
        return Replaced(planned.name, tensors)
    if isinstance(planned, RowsSet):
        return ReplacedRows(planned.name, planned.indices, tensors)
    if isinstance(planned, BiasAdded):
        return AddedBias(planned.name, planned.scale, tensors)
    spec = base.spec(origin)
    if isinstance(planned, LowRankAdded):
        return LowRank(planned.factors, tensors, spec, work, planned.magnitude, planned.along)
    if isinstance(planned, Residual):
        residual = planned
        return Computed(lambda: _residual(residual, read_float(base, origin)).astype(work), spec)
    conv = planned
    return Computed(lambda: _convolution(conv, tensors, read_float(base, origin), work), spec)


def _residual(planned: Residual, weight: Array) -> Array:
    """The base's weight without what the initialisation took."""
    stored = weight.astype(np.float64)
    whole = stored.T if planned.transposed else stored
    rank = planned.rank
    if planned.kind == "pissa":
        u, s, v = np.linalg.svd(whole, full_matrices=False)
        taken = (u[:, :rank] * s[:rank]) @ v[:rank]
    else:
        q, r = np.linalg.qr(whole)
        taken = planned.scale * (q[:, :rank] @ r[:rank])
    rest: Array = whole - taken
    return np.ascontiguousarray(rest.T if planned.transposed else rest)


def _convolution(
    planned: ConvAdded, tensors: AdapterTensors, weight: Array, work: np.dtype[Any]
) -> Array:
    """The merged weight of a convolution; a magnitude is the length of an output channel."""
    a = tensors.matrix(planned.a).astype(np.float64)
    b = tensors.matrix(planned.b).astype(np.float64)
    merged = weight.astype(np.float64) + planned.scale * (b @ a).reshape(weight.shape)
    if planned.magnitude is not None:
        flat = merged.reshape(merged.shape[0], -1)
        lengths = tensors.vector(planned.magnitude) / np.sqrt((flat * flat).sum(axis=1))
        merged = (flat * lengths[:, None]).reshape(weight.shape)
    out: Array = merged.astype(work)
    return out
