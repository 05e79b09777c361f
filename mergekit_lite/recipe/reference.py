"""How a base with adapters is written: ``base+adapter``, ``base+0.7*adapter+-0.3*other``.

An exclamation mark before an adapter says that it goes on this base whatever its config names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from mergekit_lite.errors import PackError

__all__ = ["AdapterReference", "ModelReference", "format_reference", "parse_reference"]

_WEIGHT = re.compile(
    r"\s*(?P<weight>[-+]?(\d+(\.\d*)?|\.\d+)(e-?\d+)?)\s*\*(?P<rest>.*)", re.DOTALL
)
_SPLIT = re.compile(r"(?<!\\)\+")


@dataclass(frozen=True)
class AdapterReference:
    """One adapter of a reference.

    Attributes:
        name: Folder or Hub id.
        weight: What its delta is multiplied by.
        any_base: Whether the base that its config names does not matter.
    """

    name: str
    weight: float = 1.0
    any_base: bool = False


@dataclass(frozen=True)
class ModelReference:
    """A base and the adapters on it.

    Attributes:
        base: Folder, file or Hub id.
        adapters: What is put on it.
    """

    base: str
    adapters: tuple[AdapterReference, ...]


def parse_reference(text: str) -> ModelReference:
    r"""Read a reference; ``+`` and ``*`` that belong to a name are written ``\+`` and ``\*``.

    Raises:
        PackError: A part is empty, or a weight is not finite.
    """
    base, *rest = _SPLIT.split(text)
    adapters = []
    for part in rest:
        match = _WEIGHT.fullmatch(part)
        written = (match["rest"] if match else part).strip()
        name = _plain(written.removeprefix("!"))
        weight = float(match["weight"]) if match else 1.0
        if not name or not isfinite(weight):
            raise PackError(
                f"'{text}': after '+' comes an adapter, or WEIGHT*ADAPTER, found {part!r:.60}",
                "For example: base+adapter, or base+0.7*first+-0.3*second",
            )
        adapters.append(AdapterReference(name, weight, written.startswith("!")))
    if not _plain(base):
        raise PackError(f"'{text}': no base before the '+'", "For example: base+adapter")
    return ModelReference(_plain(base), tuple(adapters))


def format_reference(base: str, adapters: Iterable[AdapterReference]) -> str:
    """Write a reference so that `parse_reference` gives the same back."""
    parts = [_escaped(base)]
    for adapter in adapters:
        escaped = ("!" if adapter.any_base else "") + _escaped(adapter.name)
        one = adapter.weight == 1.0
        parts.append(escaped if one else f"{_number(adapter.weight)}*{escaped}")
    return "+".join(parts)


def _number(weight: float) -> str:
    text = repr(float(weight)).removesuffix(".0")
    return text.replace("e+", "e")


def _plain(text: str) -> str:
    return re.sub(r"\\([+*!\\])", r"\1", text.strip())


def _escaped(text: str) -> str:
    return re.sub(r"([+*!\\])", r"\\\1", text)
