"""What a list of merges does by itself: whether two ways of cutting or merging can differ at all.

With each of its ways of cutting text, llama.cpp either merges a word that is a token or takes it as
it is, and some of its expressions cut less than a tokenizer's own. Neither matters to a vocabulary
whose merges never get that far; that is looked up here, rather than believed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

__all__ = ["Merging", "bytes_of"]


def _alphabet() -> dict[str, int]:
    """The letters that stand for bytes since GPT-2: printable ones, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _alphabet()


def bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; letters that stand for no byte are left out."""
    return bytes(_BYTES[letter] for letter in token if letter in _BYTES)


@dataclass(frozen=True)
class Merging:
    """A byte-level BPE.

    Attributes:
        vocabulary: Ids by token.
        merges: Pairs, the first to be merged first.
        whole: Whether a word that is a token is taken without merging.
        added: Tokens that are found before text is cut, so are never merged.
    """

    vocabulary: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    whole: bool = False
    added: Collection[str] = ()

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault(pair, rank)
        return ranks

    def merge(self, word: str) -> list[str]:
        """A word's tokens by merging alone."""
        parts = list(word)
        ranks, never = self._ranks, len(self.merges)
        while len(parts) > 1:
            found = [ranks.get(pair, never) for pair in pairwise(parts)]
            best = min(found)
            if best == never:
                break
            at = found.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    @cached_property
    def unmade(self) -> list[str]:
        """Tokens that merging does not give for their own text."""
        added = set(self.added)
        return [
            token
            for token in self.vocabulary
            if len(token) > 1 and token not in added and self.merge(token) != [token]
        ]

    def joins_digits(self) -> bool:
        """Whether some token holds two digits."""
        return any(sum(digits) > 1 for digits in self._digits(decoded=True))

    def joins_digits_and_others(self) -> bool:
        """Whether some token, in the letters that bytes are written as, holds digits and others."""
        return any(any(digits) and not all(digits) for digits in self._digits(decoded=False))

    def _digits(self, *, decoded: bool) -> Iterator[list[bool]]:
        for first, second in self.merges:
            token = first + second
            text = bytes_of(token).decode("utf-8", "replace") if decoded else token
            yield [unicodedata.category(letter)[0] == "N" for letter in text]
