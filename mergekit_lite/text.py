"""Text where a person will see it: of others (names of tensors, words of configs), and numbers."""

from __future__ import annotations

import unicodedata

__all__ = ["human_bytes", "plain"]

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def plain(text: str) -> str:
    """Text without what could move the cursor, turn the line round, or not be encoded.

    Control and formatting characters, separators of lines, and lone surrogates become U+FFFD.
    """
    return "".join("\ufffd" if unicodedata.category(c) in _HIDDEN else c for c in text)


def human_bytes(count: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
