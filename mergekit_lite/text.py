"""Text of others (names of tensors, words of configs) where a person will see it."""

from __future__ import annotations

import unicodedata

__all__ = ["plain"]

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def plain(text: str) -> str:
    """Text without what could move the cursor, turn the line round, or not be encoded.

    Control and formatting characters, separators of lines, and lone surrogates become U+FFFD.
    """
    return "".join("\ufffd" if unicodedata.category(c) in _HIDDEN else c for c in text)
