"""Low-rank factors of matrices: by rank, by share of energy, on the CPU or a GPU.

A matrix D is projected onto the span of its leading left singular vectors U: the factors are U and
UᵀD, whose product is the best approximation of its rank (Eckart and Young, 1936). U comes from the
eigenvectors of the smaller of D·Dᵀ and Dᵀ·D in float64. What squaring costs in accuracy concerns
only directions whose singular values are below 1e-8 of the largest, and only which of them is left
out first: a full set gives D back to the last bits. Where a rank far below full is asked for, U
comes from randomised subspace iteration instead (Halko, Martinsson, Tropp, arXiv 0909.4061,
algorithm 4.4), with a fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["Factored", "Target", "check_device", "factor_matrix", "factor_product"]

_OVERSAMPLED = 32
_ITERATIONS = 6
_SEED = 0x5EED


@dataclass(frozen=True)
class Target:
    """How much to keep.

    Attributes:
        rank: Most singular directions; None for no limit.
        energy: Share of the sum of squared singular values to keep; None for all that the rank
            allows.
    """

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Factored:
    """A matrix as a product.

    Attributes:
        b: ``(out, rank)`` float32.
        a: ``(rank, in)`` float32.
        kept: Share of the squared Frobenius norm that the product keeps, from 0.0 to 1.0.
    """

    b: Array
    a: Array
    kept: float

    @property
    def rank(self) -> int:
        """Number of singular directions."""
        return int(self.a.shape[0])

    @property
    def error(self) -> float:
        """Frobenius norm of what is lost, relative to that of the matrix."""
        return float(np.sqrt(max(0.0, 1.0 - self.kept)))


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        PackError: torch is not installed, or sees no such device.
    """
    if device == "cpu":
        return
    try:
        import torch
    except ImportError:
        raise PackError(
            f"--device {device} needs torch", "pip install 'pack-models[torch]'"
        ) from None
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        raise PackError(f"--device {device}: torch sees no such device", "Use --device cpu.")


def factor_matrix(matrix: Array, target: Target, device: str = "cpu") -> Factored:
    """Factor a dense matrix.

    Args:
        matrix: ``(out, in)``, finite; computed in float64.
        target: What to keep.
        device: ``cpu``, or a CUDA device for torch.

    Raises:
        PackError: An element is NaN or infinite.
    """
    if not np.isfinite(matrix).all():
        raise PackError("holds NaN or infinity", "The model is broken; train or download it again.")
    whole = np.asarray(matrix, np.float64)
    total = float(np.vdot(whole, whole))
    if total == 0.0:
        return Factored(np.zeros((whole.shape[0], 1), np.float32),
                        np.zeros((1, whole.shape[1]), np.float32), 1.0)  # fmt: skip
    tall = whole.shape[0] > whole.shape[1]
    flat = whole.T if tall else whole
    basis = _basis(flat, target, device)
    projected = basis.T @ flat
    squares = np.einsum("ij,ij->i", projected, projected)
    rank = _rank(squares, total, target)
    return _balanced(basis[:, :rank], projected[:rank], squares[:rank], total, transposed=tall)


def factor_product(b: Array, a: Array, target: Target) -> Factored:
    """Factor the product of two thin factors without forming it.

    Args:
        b: ``(out, r)``.
        a: ``(r, in)``.
        target: What to keep.
    """
    left, upper_left = np.linalg.qr(np.asarray(b, np.float64))
    right, upper_right = np.linalg.qr(np.asarray(a, np.float64).T)
    u, values, v = np.linalg.svd(upper_left @ upper_right.T)
    squares = values**2
    total = float(squares.sum())
    if total == 0.0:
        return Factored(np.zeros((b.shape[0], 1), np.float32),
                        np.zeros((1, a.shape[1]), np.float32), 1.0)  # fmt: skip
    rank = _rank(squares, total, target)
    basis = left @ u[:, :rank]
    projected = values[:rank, None] * (v[:rank] @ right.T)
    return _balanced(basis, projected, squares[:rank], total, transposed=False)


def _rank(squares: Array, total: float, target: Target) -> int:
    """How many directions, sorted by falling energy, reach the target."""
    most = int(np.count_nonzero(squares > total * 1e-30))
    if target.rank is not None:
        most = min(most, target.rank)
    if target.energy is not None:
        reached = np.cumsum(squares) >= target.energy * total * (1 - 1e-12)
        if reached.any():
            most = min(most, int(np.argmax(reached)) + 1)
    return max(1, most)


def _balanced(
    basis: Array, projected: Array, squares: Array, total: float, *, transposed: bool
) -> Factored:
    """Share the singular values between both factors; the largest entry of each is positive."""
    root = np.sqrt(np.sqrt(np.maximum(squares, np.finfo(np.float64).tiny)))
    largest = basis[np.argmax(np.abs(basis), axis=0), np.arange(basis.shape[1])]
    sign = np.where(largest < 0, -1.0, 1.0)
    left = basis * (sign * root)
    right = projected * (sign / root)[:, None]
    b, a = (right.T, left.T) if transposed else (left, right)
    kept = min(1.0, float(squares.sum()) / total)
    return Factored(np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32), kept)


def _basis(flat: Array, target: Target, device: str) -> Array:
    """Left singular vectors of a wide matrix, by falling singular value; ``(n, n)`` or fewer."""
    size = flat.shape[0]
    sampled = (target.rank or size) + _OVERSAMPLED
    if target.energy is None and sampled * 4 <= size:
        return _sampled(flat, sampled, device)
    if device != "cpu":
        import torch

        on_device = torch.from_numpy(flat).to(device)
        vectors = torch.linalg.eigh(on_device @ on_device.T)[1]
        found: Array = vectors.flip(1).cpu().numpy()
        return found
    return np.linalg.eigh(flat @ flat.T)[1][:, ::-1]


def _sampled(flat: Array, sampled: int, device: str) -> Array:
    random = np.random.Generator(np.random.Philox(_SEED))
    probes = random.standard_normal((flat.shape[1], sampled))
    xp: Any = np
    matrix, block = flat, probes
    if device != "cpu":
        import torch

        xp, matrix, block = torch, torch.from_numpy(flat).to(device), torch.from_numpy(probes)
        block = block.to(device)
    basis = xp.linalg.qr(matrix @ block)[0]
    for _ in range(_ITERATIONS):
        basis = xp.linalg.qr(matrix @ xp.linalg.qr(matrix.T @ basis)[0])[0]
    small = basis.T @ matrix
    rotation = xp.linalg.eigh(small @ small.T)[1]
    turned = basis @ (rotation[:, ::-1] if xp is np else rotation.flip(1))
    found: Array = turned if xp is np else turned.cpu().numpy()
    return found
