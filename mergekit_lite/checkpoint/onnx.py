"""Graphs of ONNX, seen as the tensors that they hold: names, types, shapes and where they lie.

Their weights have the names and the layout that whoever made the graph gave them, so a graph is
looked at and run, but no model is made of it. Everything in it is hostile until checked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.checkpoint.digest import sha256_of
from mergekit_lite.checkpoint.protocol import (
    Checkpoint,
    InputFile,
    Rows,
    TensorReader,
    TensorSpec,
)
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.errors import FileFormatError, PackError

__all__ = ["OnnxCheckpoint", "config_beside", "find_graph"]

# onnx.TensorProto.DataType, by number.
_TYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16",
    11: "F64", 12: "U32", 13: "U64", 16: "BF16",
}  # fmt: skip
_EXTERNAL = 1
_AGAIN = "Export it again, or copy it again with the files beside it."


def find_graph(path: Path) -> Path | None:
    """The graph that a path means: a file, or the only one in a folder without other weights.

    Raises:
        PackError: A folder has several.
    """
    if path.is_file():
        return path if path.suffix == ".onnx" else None
    alone = not (path / "config.json").is_file()  # weights that a graph links lie beside it
    if (not alone and any(path.glob("*.safetensors"))) or any(path.glob("*.gguf")):
        return None
    found = sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in found)
        raise PackError(f"{path}: has several graphs ({names})", "Name one of the files.")
    return found[0] if found else None


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: in a file, or in the graph."""

    file: Path
    offset: int
    length: int
    held: bytes | None


class _Reader(TensorReader):
    def __init__(self, spec: TensorSpec, place: _Place) -> None:
        self.spec = spec
        self._place = place

    def read(self, rows: Rows, out: Array) -> None:
        row = self.spec.columns * self.spec.dtype.itemsize
        start, count = rows.start * row, rows.size * row
        if self._place.held is not None:
            raw = self._place.held[start : start + count]
        else:
            with self._place.file.open("rb") as file:
                file.seek(self._place.offset + start)
                raw = file.read(count)
        if len(raw) != count:
            raise FileFormatError(f"{self._place.file}: is too short", _AGAIN)
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(raw, np.uint8)

    def close(self) -> None:
        """Nothing is held."""


class OnnxCheckpoint(Checkpoint):
    """A graph.

    Args:
        path: Of the ``.onnx`` file.
        label: How the user named it.

    Raises:
        FileFormatError: It is no graph, or states what is not there.
        PackError: onnx is not installed.
    """

    def __init__(self, path: Path, label: str) -> None:
        if find_spec("onnx") is None:
            raise PackError(
                f"{label}: graphs are read by 'onnx', which is not installed",
                "pip install 'pack-models[onnx]'",
            )
        import onnx

        self.label = label
        self._path = path
        above = path.parent.parent if path.parent.name == "onnx" else path.parent
        self.folder = above if (above / "config.json").is_file() else path.parent
        self.config = config_beside(self.folder)
        try:
            self._model: Any = onnx.load(path, load_external_data=False)
            self._model.graph.ByteSize()
        except Exception as error:
            raise FileFormatError(
                f"{label}: cannot be read as ONNX ({type(error).__name__})", _AGAIN
            ) from None
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, _Place] = {}
        for tensor in self._model.graph.initializer:
            kind = _TYPES.get(tensor.data_type)
            if kind is None:
                raise FileFormatError(
                    f"{label}: '{tensor.name}' is of a type that is not read here "
                    f"({tensor.data_type})", "Export it in another type.",
                )  # fmt: skip
            spec = TensorSpec(tuple(tensor.dims), DTYPES[kind])
            self._specs[tensor.name] = spec
            self._places[tensor.name] = self._place(tensor, spec)

    def _place(self, tensor: Any, spec: TensorSpec) -> _Place:
        size = prod(spec.shape) * spec.dtype.itemsize
        if tensor.data_location != _EXTERNAL:
            held = tensor.raw_data if tensor.HasField("raw_data") else _values(tensor)
            if len(held) != size:
                raise self._refuse(tensor.name, f"has {len(held)} bytes, its shape {size}")
            return _Place(self._path, 0, size, held)
        stated = {entry.key: entry.value for entry in tensor.external_data}
        name = stated.get("location", "")
        try:
            offset, length = int(stated.get("offset", 0)), int(stated.get("length", size))
        except ValueError:
            raise self._refuse(tensor.name, "has an offset that is no number") from None
        file = self._path.parent / name
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise self._refuse(tensor.name, f"lies in {name!r}, which is not beside the graph")
        if not file.is_file():
            raise self._refuse(tensor.name, f"lies in {name!r}, which is not there")
        if length != size or offset < 0 or offset + size > file.stat().st_size:
            raise self._refuse(tensor.name, f"does not fit into {name!r}")
        return _Place(file, offset, size, None)

    def _refuse(self, tensor: str, what: str) -> FileFormatError:
        return FileFormatError(f"{self.label}: '{tensor}' {what}", _AGAIN)

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self._specs[name]

    def file_of(self, name: str) -> str | None:
        """The file that holds a tensor."""
        return self._places[name].file.relative_to(self._path.parent).as_posix()

    def metadata(self) -> Mapping[str, str]:
        """Its operators, inputs and outputs."""
        graph = self._model.graph
        found = {
            "operator sets": ", ".join(
                f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in self._model.opset_import
            ),
            "inputs": _shortened([value.name for value in graph.input]),
            "outputs": _shortened([value.name for value in graph.output]),
            "operators": ", ".join(
                f"{count} {name}"
                for name, count in Counter(node.op_type for node in graph.node).most_common(8)
            ),
        }
        if self._model.producer_name:
            found["made by"] = f"{self._model.producer_name} {self._model.producer_version}".strip()
        return found

    def open(self, name: str) -> TensorReader:
        """Open a tensor."""
        return _Reader(self._specs[name], self._places[name])

    def fingerprint(self) -> str:
        """Of its files, by name, size and time."""
        return "\n".join(
            f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in self._files()
        )

    def input_files(self) -> list[InputFile]:
        """The graph and the files of its weights, hashed."""
        return [
            InputFile(
                file.relative_to(self._path.parent).as_posix(), file.stat().st_size, sha256_of(file)
            )
            for file in self._files()
        ]

    def _files(self) -> list[Path]:
        return sorted({self._path, *(place.file for place in self._places.values())})

    def close(self) -> None:
        """Nothing is held open."""


def _shortened(names: Sequence[str]) -> str:
    """Names, those of a cache said once."""
    plain = [name for name in names if not name.startswith(("past_key_values.", "present."))]
    layers = {name.split(".")[1] for name in names if name not in plain}
    return ", ".join([*plain, *([f"the cache of {len(layers)} layers"] if layers else [])])


def _values(tensor: Any) -> bytes:
    """Bytes of a tensor that is stated value by value."""
    from onnx import numpy_helper

    try:
        return bytes(np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes())
    except Exception:
        return b""  # of another length than its shape, which is refused


def config_beside(folder: Path) -> Mapping[str, object]:
    """The config.json of a folder; empty where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
