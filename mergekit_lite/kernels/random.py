"""Random bits as a function of (key, index): Philox4x32-10, a counter-based generator.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. No
state is kept, so any part of a tensor can be computed by any thread, in any order, on any machine.

Element ``i`` of a tensor takes word ``(i // 16) % 4`` of the counter ``16·(i // 64) + i % 16``, so
that sixteen counters fill 64 consecutive elements with vector stores.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.kernels.jit import TILE, inner, kernel

__all__ = ["WORDS", "key_of", "random_words", "words_of"]

WORDS = TILE + 128
"""Size of the buffer that `random_words` fills: a tile, and what lies around it in its blocks."""

_LANES = 16
_BLOCK = 64


def key_of(*parts: str | int) -> int:
    """Derive the 64-bit key of a stream from what names it, for example seed, model and tensor."""
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@inner
def random_words(key: Any, first: int, count: int, words: Any) -> int:
    """Generate the random words of elements ``first`` to ``first + count`` (only inside kernels).

    Args:
        key: uint64.
        first: Flat index of the first element.
        count: At most `TILE`.
        words: ``(WORDS,)`` uint32, filled.

    Returns:
        Index in ``words`` at which the word of element ``first`` stands.
    """
    begin = first // _BLOCK
    end = (first + count + _BLOCK - 1) // _BLOCK
    for block in range(begin, end):
        at = (block - begin) * _BLOCK
        _philox(key, np.uint64(block * _LANES), words[at : at + _BLOCK])
    return first - begin * _BLOCK


@inner
def _philox(key: Any, counter: Any, out: Any) -> None:
    """Sixteen consecutive counters, word by word."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a0 = out[0:_LANES]
    a1 = out[_LANES : 2 * _LANES]
    a2 = out[2 * _LANES : 3 * _LANES]
    a3 = out[3 * _LANES : 4 * _LANES]
    for lane in range(_LANES):
        value = counter + np.uint64(lane)
        c0 = value & mask
        c1 = value >> half
        c2 = np.uint64(0)
        c3 = np.uint64(0)
        k0 = key & mask
        k1 = key >> half
        for _ in range(10):
            p0 = c0 * np.uint64(0xD2511F53)
            p1 = c2 * np.uint64(0xCD9E8D57)
            c0 = (p1 >> half) ^ c1 ^ k0
            c1 = p1 & mask
            c2 = (p0 >> half) ^ c3 ^ k1
            c3 = p0 & mask
            k0 = (k0 + np.uint64(0x9E3779B9)) & mask
            k1 = (k1 + np.uint64(0xBB67AE85)) & mask
        a0[lane] = np.uint32(c0)
        a1[lane] = np.uint32(c1)
        a2[lane] = np.uint32(c2)
        a3[lane] = np.uint32(c3)


@kernel
def _fill(key: Any, first: int, words: Any, out: Any) -> None:
    for start in range(0, out.size, TILE):
        count = min(TILE, out.size - start)
        at = random_words(key, first + start, count, words)
        out[start : start + count] = words[at : at + count]


def words_of(key: int, first: int, count: int) -> Array:
    """The random words of some elements, as uint32 of shape ``(count,)``."""
    out = np.empty(count, np.uint32)
    _fill(np.uint64(key), first, np.empty(WORDS, np.uint32), out)
    return out
