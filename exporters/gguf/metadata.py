"""Keys and values at the head of a GGUF file.

Source: the GGUF specification, version 3 (docs/gguf.md of the ggml project). All numbers are
little-endian; a string is its length in bytes, 64 bits wide, and its UTF-8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = [
    "Kind",
    "Metadata",
    "Value",
    "encode_metadata",
    "encode_text",
    "f32",
    "f32s",
    "flag",
    "flags",
    "i8s",
    "i32",
    "i32s",
    "text",
    "texts",
    "u16",
    "u32",
]  # fmt: skip


class Kind(IntEnum):
    """The types of values, by their numbers in the format."""

    INT8 = 1
    UINT16 = 2
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8


_ARRAY = 9
_PACKED = {
    Kind.INT8: "b",
    Kind.UINT16: "H",
    Kind.UINT32: "I",
    Kind.INT32: "i",
    Kind.FLOAT32: "f",
    Kind.BOOL: "?",
}


@dataclass(frozen=True)
class Value:
    """One value, or an array of values of one kind.

    Attributes:
        kind: Of the value, or of the array's elements.
        content: A number, truth value or text; a tuple of them for an array.
    """

    kind: Kind
    content: Any


Metadata = Mapping[str, Value | bytes]
"""Values by key, or a key with its value as it stands in another file; written in this order."""


def u32(number: int) -> Value:
    """An unsigned number, as counts and token ids are."""
    return Value(Kind.UINT32, number)


def u16(number: int) -> Value:
    """A small unsigned number, as parts of a split file count themselves."""
    return Value(Kind.UINT16, number)


def i32(number: int) -> Value:
    """A signed number."""
    return Value(Kind.INT32, number)


def f32(number: float) -> Value:
    """A real number."""
    return Value(Kind.FLOAT32, number)


def flag(truth: bool) -> Value:
    """A truth value."""
    return Value(Kind.BOOL, truth)


def text(content: str) -> Value:
    """A string."""
    return Value(Kind.STRING, content)


def texts(content: Iterable[str]) -> Value:
    """An array of strings."""
    return Value(Kind.STRING, tuple(content))


def i32s(content: Iterable[int]) -> Value:
    """An array of signed numbers, as token types are."""
    return Value(Kind.INT32, tuple(content))


def i8s(content: bytes) -> Value:
    """An array of bytes."""
    return Value(Kind.INT8, tuple(byte - 256 if byte > 127 else byte for byte in content))


def f32s(content: Iterable[float]) -> Value:
    """An array of real numbers."""
    return Value(Kind.FLOAT32, tuple(content))


def flags(content: Iterable[bool]) -> Value:
    """An array of truth values."""
    return Value(Kind.BOOL, tuple(content))


def encode_metadata(metadata: Metadata) -> bytes:
    """All keys and values as they stand in the file."""
    return b"".join(
        value if isinstance(value, bytes) else encode_text(key) + _encode(value)
        for key, value in metadata.items()
    )


def encode_text(content: str) -> bytes:
    """A string as it stands in the file; lone surrogates are kept as their three bytes."""
    raw = content.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _encode(value: Value) -> bytes:
    if not isinstance(value.content, tuple):
        return struct.pack("<I", value.kind) + _elements(value.kind, (value.content,))
    head = struct.pack("<IIQ", _ARRAY, value.kind, len(value.content))
    return head + _elements(value.kind, value.content)


def _elements(kind: Kind, content: tuple[Any, ...]) -> bytes:
    if kind is Kind.STRING:
        return b"".join(encode_text(entry) for entry in content)
    return struct.pack(f"<{len(content)}{_PACKED[kind]}", *content)
