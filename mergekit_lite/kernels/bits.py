"""Whole numbers of a few bits, packed into 32-bit words without a gap, lowest bits first.

The layout that GPTQ's checkpoints (weights along the inputs, zero points along the outputs) and the
``pack-quantized`` one of compressed-tensors have in common: number ``i`` of ``b`` bits takes bits
``i·b`` to ``i·b + b − 1`` of the stream of words, so that one of 3 bits may lie in two words.
"""

from __future__ import annotations

import numpy as np

from mergekit_lite.dtypes import Array

__all__ = ["pack", "unpack", "words_of"]

_WORD = 32


def words_of(count: int, bits: int) -> int:
    """Words that so many numbers take."""
    return -(-count * bits // _WORD)


def pack(codes: Array, bits: int) -> Array:
    """Pack numbers along the first dimension.

    Args:
        codes: ``(count, others)`` uint8, each below ``2**bits``.
        bits: Of each, 1 to 8.

    Returns:
        ``(words, others)`` int32.
    """
    count, others = codes.shape
    words = np.zeros((words_of(count, bits), others), np.uint32)
    for index in range(count):
        word, shift = divmod(index * bits, _WORD)
        wide = codes[index].astype(np.uint32)
        words[word] |= wide << np.uint32(shift)
        if shift + bits > _WORD:
            words[word + 1] |= wide >> np.uint32(_WORD - shift)
    return words.view(np.int32)


def unpack(words: Array, bits: int, count: int) -> Array:
    """Unpack numbers along the first dimension.

    Args:
        words: ``(words, others)`` int32 or uint32.
        bits: Of each number, 1 to 8.
        count: How many there are.

    Returns:
        ``(count, others)`` uint8.
    """
    wide = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((count, words.shape[1]), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for index in range(count):
        word, shift = divmod(index * bits, _WORD)
        found = wide[word] >> np.uint32(shift)
        if shift + bits > _WORD:
            found = found | (wide[word + 1] << np.uint32(_WORD - shift))
        codes[index] = found & mask
    return codes
