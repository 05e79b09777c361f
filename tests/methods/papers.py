"""The papers' formulas in float64 numpy, written from the papers and sharing no code with pack.

Arguments are lists of arrays; every function returns float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def linear(models: Sequence[Array], weights: Sequence[float], normalize: bool = True) -> Array:
    """Model soups, section 2: the (weighted) mean of the parameters."""
    total = sum(w * m for w, m in zip(weights, models, strict=True))
    return total / sum(weights) if normalize else total


def slerp(first: Array, second: Array, t: float) -> Array:
    """Shoemake 1985, with the vectors' own lengths kept; a line where they are nearly parallel."""
    a, b = first.ravel(), second.ravel()
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    omega = np.arccos(cosine)
    return (np.sin((1 - t) * omega) * first + np.sin(t * omega) * second) / np.sin(omega)


def task_arithmetic(
    base: Array, models: Sequence[Array], weights: Sequence[float], lam: float = 1.0
) -> Array:
    """Ilharco et al., section 2."""
    return base + lam * sum(w * (m - base) for w, m in zip(weights, models, strict=True))


def trim(delta: Array, density: float) -> Array:
    """TIES, section 4: keep the top share by magnitude, set the rest to zero."""
    keep = max(1, int(density * delta.size))
    threshold = np.sort(np.abs(delta).ravel())[::-1][keep - 1]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def merge_signs(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], lam: float, normalize: bool
) -> Array:
    """TIES, section 4: elect by the larger total movement, then the mean of those that agree."""
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    elected = np.where(sum(weighted) >= 0, 1.0, -1.0)
    total, count = np.zeros_like(base), np.zeros_like(base)
    for w, d in zip(weights, weighted, strict=True):
        agrees = np.sign(d) == elected
        total += np.where(agrees, d, 0.0)
        count += np.where(agrees, w, 0.0)
    if normalize:
        total = np.divide(total, count, out=np.zeros_like(total), where=count != 0)
    return base + lam * total


def ties(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    lam: float = 1.0,
) -> Array:
    """TIES as a whole."""
    deltas = [trim(m - base, p) for m, p in zip(models, densities, strict=True)]
    return merge_signs(base, deltas, weights, lam, normalize=True)


def philox4x32(counter: int, key: int) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011, section 3) of one counter, in Python integers."""
    c = [(counter >> (32 * i)) & 0xFFFFFFFF for i in range(4)]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def drop_mask(
    seed: int, model: str, tensor: str, size: int, density: float
) -> npt.NDArray[np.bool_]:
    """The mask that pack documents: element i takes word (i//16)%4 of counter 16·(i//64) + i%16."""
    parts = (seed, model, tensor)
    text = "".join(f"{len(str(p))}:{p}" for p in parts)
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    words = [philox4x32(16 * (i // 64) + i % 16, key)[(i // 16) % 4] for i in range(size)]
    return np.array(words, np.uint64) < round(density * 2**32)


def dare(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    masks: Sequence[npt.NDArray[np.bool_]],
    *,
    signs: bool,
    lam: float = 1.0,
) -> Array:
    """DARE, section 3: drop, rescale by 1/p; then a sum, or the sign election of TIES."""
    deltas = [
        np.where(mask.reshape(base.shape), m - base, 0.0) / p
        for m, p, mask in zip(models, densities, masks, strict=True)
    ]
    if signs:
        return merge_signs(base, deltas, weights, lam, normalize=False)
    return base + lam * sum(w * d for w, d in zip(weights, deltas, strict=True))
