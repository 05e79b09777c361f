"""Schemes as a user writes them: ``w4g128`` is 4 bits with a scale for every 128 inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergekit_lite.errors import PackError

__all__ = ["BITS", "GROUPS", "Scheme", "parse_scheme"]

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
_WORD = re.compile(r"w(?P<bits>\d+)(g(?P<group>\d+|-1))?(-(?P<kind>sym|asym))?")


@dataclass(frozen=True)
class Scheme:
    """A grid for the weights of linear layers.

    Attributes:
        bits: Of a weight.
        group: Inputs that share a scale; None for all of them.
        symmetric: Whether the zero point is the middle of the codes.
    """

    bits: int
    group: int | None
    symmetric: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def size(self, columns: int) -> int:
        """Inputs that share a scale in a matrix of so many."""
        return self.group or columns


def parse_scheme(word: str, symmetric: bool) -> Scheme:
    """Read a scheme.

    Args:
        word: ``w4g128``, ``w4g128-asym``, ``w8``; without a group a scale serves a whole row.
        symmetric: What a scheme without ``-sym`` or ``-asym`` is.

    Raises:
        PackError: It is none.
    """
    found = _WORD.fullmatch(word.lower())
    bits = int(found["bits"]) if found else 0
    group = int(found["group"]) if found and found["group"] else -1
    if found is None or bits not in BITS or (group != -1 and group not in GROUPS):
        raise PackError(
            f"'{word}' is no scheme of weights on a grid",
            "Write w4g128: 2, 3, 4 or 8 bits, a scale for 32, 64 or 128 inputs (none: for a whole "
            "row), and -sym or -asym behind it if you want.",
        )
    kind = found["kind"]
    return Scheme(
        bits, None if group == -1 else group, symmetric if kind is None else kind == "sym"
    )
