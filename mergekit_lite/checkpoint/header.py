"""Headers of safetensors files: a strict, total parser and a canonical writer.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a
JSON object from tensor name to ``{"dtype", "shape", "data_offsets"}`` with offsets relative to the
end of the header, an optional ``__metadata__`` of strings, then the data without holes.

Everything in a header is hostile until checked. No length that it states is used to allocate or to
read before it has been compared with the size of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from mergekit_lite.dtypes import DTYPES, DType
from mergekit_lite.errors import FileFormatError, nearest

__all__ = ["MAX_HEADER_BYTES", "Entry", "Header", "parse_header", "read_length", "write_header"]

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library sets, in bytes."""

_MAX_DIMENSION = 2**63 - 1
_MAX_DIMENSIONS = 64
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: Element type.
        shape: Dimensions; empty for a scalar.
        start: First byte of the data, counted from the start of the file.
        end: One past its last byte.
    """

    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        entries: Tensors by name, in the order of their data.
        metadata: The strings under ``__metadata__``.
        data_start: Byte at which the data begins.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


class _Reject(Exception):
    """Raised inside the parser; the caller adds the name of the file."""


def read_length(prefix: bytes, file_bytes: int, source: str) -> int:
    """Check the first 8 bytes of a file and return the length of its header in bytes.

    Raises:
        FileFormatError: The file is too short, or the length cannot be true.
    """
    if file_bytes < 8 or len(prefix) < 8:
        raise FileFormatError(
            f"{source}: {file_bytes} bytes are too few for a safetensors file",
            "Copy the file again.",
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise FileFormatError(
            f"{source}: not a safetensors file (it states a header of {length} bytes, "
            f"the format allows {MAX_HEADER_BYTES})",
            "Check that this is a model file and not, say, a page that was saved instead of it.",
        )
    if length > file_bytes - 8:
        raise FileFormatError(
            f"{source}: truncated (it states a header of {length} bytes, "
            f"the file has {file_bytes - 8} after the length)",
            "Copy or download the file again.",
        )
    return length


def parse_header(raw: bytes, file_bytes: int, source: str) -> Header:
    """Parse and check a header.

    Args:
        raw: The header's bytes, without the 8 bytes of its length.
        file_bytes: Size of the whole file, in bytes.
        source: Name of the file, for messages.

    Raises:
        FileFormatError: Anything about it that the format does not allow; names file and tensor.
    """
    try:
        return _parse(raw, file_bytes)
    except _Reject as reject:
        raise FileFormatError(f"{source}: {reject}", "Copy or download the file again.") from None


def _parse(raw: bytes, file_bytes: int) -> Header:
    document = _decode(raw)
    metadata = _metadata(document.pop("__metadata__", {}))
    data_start = 8 + len(raw)
    data_bytes = file_bytes - data_start
    entries = [
        (name, _entry(name, value, data_start, data_bytes)) for name, value in document.items()
    ]
    # An empty tensor may share its offset with the one that follows it.
    entries.sort(key=lambda item: (item[1].start, item[1].end))
    at = data_start
    for name, entry in entries:
        if entry.start != at:
            kind = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise _Reject(
                f"tensor '{name}' {kind} (begins at byte {entry.start - data_start} of the data, "
                f"expected {at - data_start})"
            )
        at = entry.end
    if at != file_bytes:
        missing = "truncated" if at > file_bytes else "followed by bytes that belong to no tensor"
        raise _Reject(
            f"data is {missing} ({data_bytes} bytes, the header describes {at - data_start})"
        )
    return Header(dict(entries), metadata, data_start)


def _decode(raw: bytes) -> dict[str, object]:
    if raw[:1] != b"{":
        raise _Reject("not a safetensors file (the header does not begin with '{')")
    try:
        text = raw.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Reject:
        raise
    except RecursionError:
        raise _Reject("the header is nested too deeply") from None
    except ValueError as error:  # bad UTF-8, bad JSON, an integer of thousands of digits
        raise _Reject(f"the header is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise _Reject("the header is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Reject(f"the header has the key '{key}' twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> object:
    raise _Reject(f"the header holds {name}, which is no JSON")


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _Reject("__metadata__ is not an object of strings")
    return value


def _entry(name: str, value: object, data_start: int, data_bytes: int) -> Entry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _Reject(f"tensor name {name!r:.80} is not valid Unicode") from None
    if not isinstance(value, dict):
        raise _Reject(f"tensor '{name}' is not described by an object")
    if value.keys() != _ENTRY_KEYS:
        for key in sorted(_ENTRY_KEYS - value.keys()):
            raise _Reject(f"tensor '{name}' has no '{key}'")
        unknown = min(value.keys() - _ENTRY_KEYS)
        raise _Reject(f"tensor '{name}' has an unknown key '{unknown}'")
    dtype_name = value["dtype"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        close = nearest(dtype_name, DTYPES) if isinstance(dtype_name, str) else ""
        raise _Reject(f"tensor '{name}' has the unknown dtype {dtype_name!r:.40}{close}")
    shape = _integers(value["shape"], f"the shape of tensor '{name}'", _MAX_DIMENSIONS)
    start, end = _pair(value["data_offsets"], name)
    if not 0 <= start <= end <= data_bytes:
        raise _Reject(
            f"tensor '{name}' lies outside the file "
            f"(bytes {start} to {end} of {data_bytes} bytes of data)"
        )
    expected = prod(shape) * dtype.itemsize
    if end - start != expected:
        raise _Reject(
            f"tensor '{name}' has {end - start} bytes, "
            f"its shape {list(shape)} of {dtype.name} takes {expected}"
        )
    return Entry(dtype, shape, data_start + start, data_start + end)


def _integers(value: object, what: str, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise _Reject(f"{what} is not a list of at most {most} integers")
    for item in value:
        if type(item) is not int or not 0 <= item <= _MAX_DIMENSION:
            raise _Reject(f"{what} holds {item!r:.40}, not an integer from 0 to 2^63 - 1")
    return tuple(value)


def _pair(value: object, name: str) -> tuple[int, int]:
    offsets = _integers(value, f"data_offsets of tensor '{name}'", 2)
    if len(offsets) != 2:
        raise _Reject(f"data_offsets of tensor '{name}' is not a pair")
    return offsets[0], offsets[1]


def write_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Lay tensors out one after the other and write their header canonically.

    Keys are sorted and the header is padded with spaces to a multiple of 8 bytes, so the same
    tensors always give the same bytes (the safetensors library orders ``__metadata__`` at random).

    Args:
        tensors: Name, dtype and shape of each, in the order of their data.
        metadata: Strings for ``__metadata__``; left out when empty.

    Returns:
        The bytes that begin the file (length and header), and the header as it would be parsed.
    """
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: list[tuple[str, DType, tuple[int, ...], int, int]] = []
    at = 0
    for name, dtype, shape in tensors:
        end = at + prod(shape) * dtype.itemsize
        document[name] = {"data_offsets": [at, end], "dtype": dtype.name, "shape": list(shape)}
        offsets.append((name, dtype, shape, at, end))
        at = end
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    entries = {n: Entry(d, s, base + a, base + b) for n, d, s, a, b in offsets}
    return len(text).to_bytes(8, "little") + text, Header(entries, dict(metadata), base)
