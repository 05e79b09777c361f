"""A folder of safetensors, single or sharded, or one such file, as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from mergekit_lite.checkpoint.file import WeightFile
from mergekit_lite.checkpoint.header import Header, parse_header, read_length
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import FileFormatError, PackError

__all__ = [
    "INDEX_NAME", "SafetensorsCheckpoint", "SafetensorsFile", "StoredFile", "load_json",
    "read_weight_map",
]  # fmt: skip

INDEX_NAME = "model.safetensors.index.json"
_INDEX_LIMIT = 1 << 28


class StoredFile(Protocol):
    """A file of safetensors, wherever it lies; see `WeightFile` for what its methods do."""

    @property
    def path(self) -> Path | str:
        """Where it lies, for messages."""

    name: str
    header: Header

    def read(self, offset: int, out: Array) -> None:
        """Fill a contiguous array from a byte offset."""

    def will_need(self, offset: int, count: int) -> None:
        """Ask for bytes to be fetched ahead."""

    def fingerprint(self) -> str:
        """What tells its state, in one line."""

    def finish(self) -> InputFile:
        """Hash the rest of the file, and check that nobody changed it meanwhile."""

    def close(self) -> None:
        """Close it."""


class SafetensorsFile(WeightFile):
    """One open file: its checked header, positioned reads, and the digest of its bytes."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        try:
            prefix = self.peek(0, 8)
            length = read_length(prefix, self.size, str(path))
            raw = self.peek(8, length)
            self.header: Header = parse_header(raw, self.size, str(path))
            self.note_head(prefix + raw)
        except BaseException:
            self.close()
            raise


class _FileReader(TensorReader):
    def __init__(self, file: StoredFile, start: int, spec: TensorSpec) -> None:
        self.spec = spec
        self._file = file
        self._start = start
        self._row_bytes = spec.columns * spec.dtype.itemsize

    @property
    def origin(self) -> Hashable:
        return id(self._file), self._start

    @property
    def far(self) -> bool:
        return not isinstance(self._file, SafetensorsFile)

    def read(self, rows: Rows, out: Array) -> None:
        self._file.read(self._start + rows.start * self._row_bytes, out)


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of one safetensors file, or of a folder of them with or without an index."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or str(path)
        self.config = {}
        self.folder = path if path.is_dir() else None
        self._files: list[StoredFile] = []
        self._where: dict[str, StoredFile] = {}
        try:
            if self.folder is not None:
                config = path / "config.json"
                self.config = load_json(config) if config.is_file() else {}
                self._open_folder(path)
            else:
                self._add(SafetensorsFile(path, path.name))
        except BaseException:
            self.close()
            raise
        self._names = sorted(self._where)

    def _add(self, file: StoredFile) -> None:
        self._files.append(file)
        for name in file.header.entries:
            if name in self._where:
                raise FileFormatError(
                    f"{file.path}: tensor '{name}' is also in {self._where[name].name}",
                    "Remove the shards that belong to another model, or restore the index.",
                )
            self._where[name] = file

    def _open_folder(self, folder: Path) -> None:
        index = folder / INDEX_NAME
        if not index.is_file():
            single = folder / "model.safetensors"
            found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
            for path in found:
                self._add(SafetensorsFile(path, path.name))
            return
        weight_map = read_weight_map(index)
        for shard in sorted(set(weight_map.values())):
            path = folder / shard
            if not path.is_file():
                raise FileFormatError(
                    f"{index}: names the shard '{shard}', which is not there",
                    "Finish the download of the model.",
                )
            self._add(SafetensorsFile(path, shard))
        self._check_index(weight_map)

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        """Refuse shards that do not hold what the index promises, and that alone."""
        held = {file.name: file for file in self._files}
        for name, shard in weight_map.items():
            found = self._where.get(name)
            if found is None or found.name != shard:
                raise FileFormatError(
                    f"{held[shard].path}: lacks the tensor '{name}' that {INDEX_NAME} promises",
                    "Download shards and index of the same revision.",
                )
        for name in self._where.keys() - weight_map.keys():
            raise FileFormatError(
                f"{self._where[name].path}: holds the tensor '{name}', "
                f"which {INDEX_NAME} does not name",
                "Download shards and index of the same revision.",
            )

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        entry = self._where[name].header.entries[name]
        return TensorSpec(entry.shape, entry.dtype)

    def file_of(self, name: str) -> str | None:
        """Name of the shard that holds a tensor."""
        return self._where[name].name

    def place_of(self, name: str) -> tuple[Path, int, int]:
        """Where a tensor lies: the file, its first byte there, and its bytes.

        Raises:
            PackError: It is not on this disk.
        """
        file = self._where[name]
        if not isinstance(file, SafetensorsFile):
            raise PackError(
                f"{file.path}: is not on this disk, so nothing can point into it",
                "Download the model, and give its folder.",
            )
        entry = file.header.entries[name]
        return file.path, entry.start, entry.end - entry.start

    def metadata(self) -> Mapping[str, str]:
        """The ``__metadata__`` of all shards; the first that has a key holds."""
        found: dict[str, str] = {}
        for file in self._files:
            found = {**file.header.metadata, **found}
        return found

    def open(self, name: str) -> TensorReader:
        """Open a tensor for reading by rows."""
        file = self._where[name]
        return _FileReader(file, file.header.entries[name].start, self.spec(name))

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor ahead, at most 64 MB of it."""
        file = self._where[name]
        file.will_need(file.header.entries[name].start, min(self.spec(name).nbytes, 1 << 26))

    def fingerprint(self) -> str:
        """Names, sizes, times and headers of all files."""
        return "\n".join(file.fingerprint() for file in self._files)

    def input_files(self) -> list[InputFile]:
        """The shards, hashed."""
        return [file.finish() for file in self._files]

    def close(self) -> None:
        """Close the shards."""
        for file in self._files:
            file.close()


def load_json(path: Path) -> Mapping[str, object]:
    """Read a JSON object from a small file.

    Raises:
        FileFormatError: It is larger than 256 MB, is no JSON, or is not an object.
    """
    try:
        if path.stat().st_size > _INDEX_LIMIT:
            raise FileFormatError(f"{path}: too large for a JSON file of a model")
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: not valid JSON ({error})", "Download the file again."
        ) from None
    if not isinstance(document, dict):
        raise FileFormatError(f"{path}: not a JSON object", "Download the file again.")
    return document


def read_weight_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in, by a model's index.

    Raises:
        FileFormatError: It is no index, or it names a file outside the model.
    """
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{index}: has no 'weight_map'", "Download the file again.")
    seen: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise FileFormatError(f"{index}: gives no file name for the tensor '{name}'")
        if shard not in seen:
            seen.add(shard)
            _check_shard_name(index, name, shard)
    return weight_map


def _check_shard_name(index: Path, name: str, shard: str) -> None:
    pure = PurePosixPath(shard)
    if pure.is_absolute() or ".." in pure.parts or "\\" in shard or "\0" in shard or not pure.parts:
        raise FileFormatError(
            f"{index}: names a file outside the model's folder "
            f"for the tensor '{name}' ({shard!r:.80})",
            "Do not use this model; its index was tampered with.",
        )
    if not shard.endswith(".safetensors"):
        raise FileFormatError(f"{index}: '{shard}' is not a safetensors file")
