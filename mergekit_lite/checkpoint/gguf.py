"""GGUF files read back: a strict, total parser of their heads, and their tensors as a checkpoint.

The format (docs/gguf.md of the ggml project), versions 2 and 3, little-endian: magic, version,
number of tensors, number of keys; keys with typed values; for each tensor its name, dimensions from
the last to the first, type and offset; then, aligned, the data.

Everything in a head is hostile until checked. No length that it states is used to allocate or to
read before it has been compared with the size of the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.checkpoint.file import WeightFile
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import DTYPES, Array, DType
from mergekit_lite.errors import FileFormatError
from mergekit_lite.kernels.blocks.types import TYPES, TensorType

__all__ = ["GgufCheckpoint", "GgufFile", "Place"]

_MAGIC = b"GGUF"
_PIECE = 1 << 20
_LONGEST_KEY = 1 << 16
_LONGEST_NAME = 1 << 10
_MOST_DIMENSIONS = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_AGAIN = "Download or make the file again."


@dataclass(frozen=True)
class Place:
    """One tensor of a file.

    Attributes:
        kind: Its type.
        shape: Rows first.
        start: Byte at which its data begins, from the start of the file.
    """

    kind: TensorType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.kind.row_bytes(self.shape[-1]) * prod(self.shape[:-1])


class _Cursor:
    """Reads a head from its start, no further than the file goes."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._held = b""
        self._begin = 0
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self._file.size - self.at:
            raise FileFormatError(
                f"{self._file.path}: ends inside its head: {count} bytes are wanted at byte "
                f"{self.at} of {self._file.size}",
                _AGAIN,
            )
        start = self.at - self._begin
        if start + count > len(self._held):
            self._held = self._file.peek(self.at, max(count, _PIECE))
            self._begin, start = self.at, 0
        self.at += count
        return self._held[start : start + count]

    def number(self, code: str) -> Any:
        """The next number."""
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        """The next string."""
        count = self.number("Q")
        if longest is not None and count > longest:
            self.fail(f"{what} has {count} bytes; at most {longest} are sane")
        return self.take(count).decode("utf-8", "surrogateescape")

    def fail(self, what: str) -> None:
        """Refuse the file."""
        raise FileFormatError(f"{self._file.path}: {what}", _AGAIN)


class GgufFile(WeightFile):
    """One open file: its checked head, and positioned reads.

    Attributes:
        values: Metadata by key; arrays are lists or numpy arrays.
        raw: The bytes of each key with its value, as they stand in the file.
        places: Tensors by name, in their order.

    Raises:
        FileFormatError: The file is not what the format promises.
    """

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        try:
            cursor = _Cursor(self)
            if self.size < 24 or cursor.take(4) != _MAGIC:
                cursor.fail("is no GGUF file (it does not begin with 'GGUF')")
            version = cursor.number("I")
            if version not in (2, 3):
                swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
                cursor.fail(
                    "is big-endian, which is not read here"
                    if swapped
                    else f"is version {version} of GGUF; 2 and 3 are read"
                )
            tensors, keys = cursor.number("Q"), cursor.number("Q")
            # A tensor takes at least 24 bytes of a head, a key 13.
            if tensors * 24 > self.size or keys * 13 > self.size:
                cursor.fail(f"states {tensors} tensors and {keys} keys, more than it has room for")
            self.values: Mapping[str, Any] = self._values(cursor, keys)
            self.places: Mapping[str, Place] = self._places(cursor, tensors)
            self.note_head(self.peek(0, cursor.at))
        except BaseException:
            self.close()
            raise

    def _values(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self.raw: dict[str, bytes] = {}
        for _ in range(count):
            start = cursor.at
            key = cursor.text("a key", _LONGEST_KEY)
            if key in values:
                cursor.fail(f"has the key '{key}' twice")
            values[key] = self._value(cursor, key)
            self.raw[key] = self.peek(start, cursor.at - start)
        return values

    def _value(self, cursor: _Cursor, key: str) -> Any:
        kind = cursor.number("I")
        if kind in _NUMBERS:
            return cursor.number(_NUMBERS[kind])
        if kind == _BOOL:
            return self._truth(cursor, key, cursor.take(1))[0]
        if kind == _TEXT:
            return cursor.text(f"'{key}'")
        if kind != _ARRAY:
            cursor.fail(f"'{key}' has the unknown type {kind}")
        inner, count = cursor.number("I"), cursor.number("Q")
        if inner in _NUMBERS:
            size = struct.calcsize(_NUMBERS[inner])
            raw = cursor.take(self._room(cursor, key, count, size))
            return np.frombuffer(raw, "<" + _NUMBERS[inner])
        if inner == _BOOL:
            return self._truth(cursor, key, cursor.take(self._room(cursor, key, count, 1)))
        if inner == _TEXT:
            self._room(cursor, key, count, 8)
            return [cursor.text(f"'{key}'") for _ in range(count)]
        cursor.fail(f"'{key}' is an array of type {inner}, which is not read here")
        return None

    def _room(self, cursor: _Cursor, key: str, count: int, size: int) -> int:
        if count * size > self.size - cursor.at:
            cursor.fail(f"'{key}' states {count} elements, more than the file has room for")
        return count * size

    def _truth(self, cursor: _Cursor, key: str, raw: bytes) -> list[bool]:
        if raw.translate(None, b"\0\1"):
            cursor.fail(f"'{key}' holds a truth value that is neither 0 nor 1")
        return [byte == 1 for byte in raw]

    def _places(self, cursor: _Cursor, count: int) -> dict[str, Place]:
        alignment = self.values.get("general.alignment", 32)
        sane = isinstance(alignment, int) and 8 <= alignment <= 1 << 20
        if not sane or alignment & (alignment - 1):
            cursor.fail(f"states an alignment of {alignment!r:.40} bytes")
        found: list[tuple[str, TensorType, tuple[int, ...], int]] = []
        names: set[str] = set()
        for _ in range(count):
            name, kind, shape, offset = self._info(cursor)
            if name in names:
                cursor.fail(f"has the tensor '{name}' twice")
            if offset % alignment:
                cursor.fail(f"'{name}' begins at {offset}, not at a multiple of {alignment}")
            names.add(name)
            found.append((name, kind, shape, offset))
        start = cursor.at + -cursor.at % alignment
        places = {n: Place(kind, shape, start + offset) for n, kind, shape, offset in found}
        end = 0
        for name, place in sorted(places.items(), key=lambda item: item[1].start):
            if place.start + place.nbytes > self.size:
                cursor.fail(
                    f"'{name}' ends at byte {place.start + place.nbytes} of {self.size}: the file "
                    "is cut off"
                )
            if place.start < end:
                cursor.fail(f"'{name}' overlaps another tensor")
            end = place.start + place.nbytes
        return places

    def _info(self, cursor: _Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
        name = cursor.text("a tensor's name", _LONGEST_NAME)
        dimensions = cursor.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            cursor.fail(f"'{name}' has {dimensions} dimensions")
        shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
        number, offset = cursor.number("I"), cursor.number("Q")
        kind = _BY_NUMBER.get(number)
        if kind is None:
            cursor.fail(f"'{name}' has the type {number}, which is not known here")
            raise AssertionError
        if 0 in shape or shape[-1] % kind.block:
            cursor.fail(
                f"'{name}' is {list(shape)}; {kind.name} has blocks of {kind.block} elements"
            )
        if prod(shape) // kind.block * kind.block_bytes > self.size:
            cursor.fail(f"'{name}' {list(shape)} is larger than the file")
        return name, kind, shape, offset


class _Reader(TensorReader):
    def __init__(self, file: GgufFile, place: Place, spec: TensorSpec) -> None:
        self.spec = spec
        self._file = file
        self._place = place
        self._row_bytes = place.kind.row_bytes(spec.columns)

    def read(self, rows: Rows, out: Array) -> None:
        start = self._place.start + rows.start * self._row_bytes
        if self._place.kind.name in DTYPES:
            self._file.read(start, out)
            return
        stored = np.empty((rows.size, self._row_bytes), np.uint8)
        self._file.read(start, stored)
        self._place.kind.decode(stored, out.reshape(rows.size, self.spec.columns))


class GgufCheckpoint(Checkpoint):
    """Tensors of a GGUF file under its own names, dequantized to float32 where they need it.

    Args:
        path: The file; of one that is split, any part.
        label: How the user named it.

    Attributes:
        values: Its metadata.
        raw: The bytes of each key with its value.

    Raises:
        FileFormatError: A file is not what the format promises, or a part is missing.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or str(path)
        self.folder = None
        self.config = {}
        self._files: list[GgufFile] = []
        self._where: dict[str, GgufFile] = {}
        try:
            for part in _parts(path):
                file = GgufFile(part, part.name)
                self._files.append(file)
                for name in file.places:
                    if name in self._where:
                        raise FileFormatError(
                            f"{part}: the tensor '{name}' is also in {self._where[name].name}",
                            "The parts are of different files.",
                        )
                    self._where[name] = file
        except BaseException:
            self.close()
            raise
        self.values, self.raw = self._files[0].values, self._files[0].raw
        self.config = _config(self.values)
        self._check_parts(path)
        self._names = sorted(self._where)

    def _check_parts(self, path: Path) -> None:
        count = self.values.get("split.count")
        total = self.values.get("split.tensors.count")
        if count is not None and (count != len(self._files) or total != len(self._where)):
            self.close()
            raise FileFormatError(
                f"{path}: is one of {count} parts with {total} tensors; there are "
                f"{len(self._files)} with {len(self._where)}",
                "Bring all parts into one folder, under the names that they were made with.",
            )

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Shape of a tensor, and its type, float32 where it is quantized."""
        place = self._where[name].places[name]
        return TensorSpec(place.shape, _dtype(place.kind))

    def stored(self, name: str) -> tuple[str, int]:
        """The type that a tensor is stored in, and its bytes."""
        place = self._where[name].places[name]
        return place.kind.name, place.nbytes

    def metadata(self) -> Mapping[str, str]:
        """What the file says of itself, as far as it is text."""
        return {
            key: value
            for key, value in self.values.items()
            if isinstance(value, str) and not key.startswith("tokenizer.chat_template")
        }

    def file_of(self, name: str) -> str | None:
        """Name of the part that holds a tensor."""
        return self._where[name].name

    def open(self, name: str) -> TensorReader:
        """Open a tensor for reading by rows."""
        file = self._where[name]
        return _Reader(file, file.places[name], self.spec(name))

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor ahead, at most 64 MB of it."""
        place = self._where[name].places[name]
        self._where[name].will_need(place.start, min(place.nbytes, 1 << 26))

    def fingerprint(self) -> str:
        """Names, sizes, times and heads of all files."""
        return "\n".join(file.fingerprint() for file in self._files)

    def input_files(self) -> list[InputFile]:
        """The files, hashed."""
        return [file.finish() for file in self._files]

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _config(values: Mapping[str, Any]) -> dict[str, object]:
    """What a config.json would say of sizes, and that the weights are GGUF's."""
    architecture = values.get("general.architecture")
    found: dict[str, object] = {"model_type": architecture}
    for key, name in _SIZES.items():
        value = values.get(f"{architecture}.{key}")
        if isinstance(value, int):
            found[name] = value
    tokens = values.get("tokenizer.ggml.tokens")
    if "vocab_size" not in found and isinstance(tokens, list):
        found["vocab_size"] = len(tokens)
    found["quantization_config"] = {"quant_method": "gguf"}
    return found


def _dtype(kind: TensorType) -> DType:
    return DTYPES.get(kind.name, DTYPES["F32"])


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in
             range(1, count + 1)]  # fmt: skip
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise FileFormatError(
            f"{path}: lacks {len(missing)} of its {count} parts, first {missing[:1]}",
            "Download all parts into one folder.",
        )
    return parts
