"""A folder of safetensors, single or sharded, or one such file, as a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from mergekit_lite.checkpoint.digest import FileDigest, as_bytes, read_into
from mergekit_lite.checkpoint.header import Header, parse_header, read_length
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import FileFormatError, PackError

__all__ = ["SafetensorsCheckpoint", "SafetensorsFile", "load_json"]

INDEX_NAME = "model.safetensors.index.json"
_INDEX_LIMIT = 1 << 28


class SafetensorsFile:
    """One open file: its checked header, positioned reads, and the digest of its bytes."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        if not path.is_file():
            raise FileFormatError(
                f"{path}: is not a regular file", "Give a folder of safetensors or such a file."
            )
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FileFormatError(
                f"{path}: cannot be opened ({error.strerror})",
                "Check the path and its permissions.",
            ) from None
        try:
            self._stat = os.fstat(self._fd)
            self.size = self._stat.st_size
            prefix = os.pread(self._fd, 8, 0)
            if prefix == b"version ":
                raise FileFormatError(
                    f"{path}: is a pointer of Git LFS, not the file itself",
                    "Fetch the file: git lfs pull",
                )
            length = read_length(prefix, self.size, str(path))
            raw = bytearray(length)
            read_into(self._fd, 8, memoryview(raw), str(path))
            self.header: Header = parse_header(bytes(raw), self.size, str(path))
            self._header_sha256 = hashlib.sha256(prefix + raw).hexdigest()
            self._known = KNOWN.find(self._stat)
            self._digest = FileDigest(self._fd, self.size, str(path))
            self._digest.feed(0, memoryview(prefix + bytes(raw)))
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, offset: int, out: Array) -> None:
        """Fill a contiguous array from a byte offset, and hash what passes if that is not known."""
        view = as_bytes(out)
        read_into(self._fd, offset, view, str(self.path))
        if self._known is None:
            self._digest.feed(offset, view)

    def will_need(self, offset: int, count: int) -> None:
        """Ask the system to fetch bytes ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """Name, size, time of change and header in one line."""
        return f"{self.name} {self.size} {self._stat.st_mtime_ns} {self._header_sha256}"

    def finish(self) -> InputFile:
        """Hash the rest of the file and check that nobody changed it meanwhile."""
        sha256 = self._known or self._digest.hexdigest()
        try:
            now = self.path.stat()
        except OSError:
            now = None
        if now is None or _state(now) != _state(self._stat):
            raise PackError(
                f"{self.path}: changed while it was being read",
                "Wait until whatever writes it is done, then run again.",
            )
        KNOWN.note(self._stat, sha256)
        return InputFile(self.name, self.size, sha256)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class _FileReader(TensorReader):
    def __init__(self, file: SafetensorsFile, start: int, spec: TensorSpec) -> None:
        self.spec = spec
        self._file = file
        self._start = start
        self._row_bytes = spec.columns * spec.dtype.itemsize

    @property
    def origin(self) -> Hashable:
        return id(self._file), self._start

    def read(self, rows: Rows, out: Array) -> None:
        self._file.read(self._start + rows.start * self._row_bytes, out)


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of one safetensors file, or of a folder of them with or without an index."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or str(path)
        self.config = {}
        self.folder = path if path.is_dir() else None
        self._files: list[SafetensorsFile] = []
        self._where: dict[str, SafetensorsFile] = {}
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

    def _add(self, file: SafetensorsFile) -> None:
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
        weight_map = _weight_map(index)
        for shard in sorted(set(weight_map.values())):
            path = folder / shard
            if not path.is_file():
                raise FileFormatError(
                    f"{index}: names the shard '{shard}', which is not there",
                    "Finish the download of the model.",
                )
            self._add(SafetensorsFile(path, shard))
        for name, shard in weight_map.items():
            held = self._where.get(name)
            if held is None or held.name != shard:
                raise FileFormatError(
                    f"{folder / shard}: lacks the tensor '{name}' that {INDEX_NAME} promises",
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


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{index}: has no 'weight_map'", "Download the file again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise FileFormatError(f"{index}: gives no file name for the tensor '{name}'")
        pure = PurePosixPath(shard)
        if (
            pure.is_absolute()
            or ".." in pure.parts
            or "\\" in shard
            or "\0" in shard
            or not pure.parts
        ):
            raise FileFormatError(
                f"{index}: names a file outside the model's folder "
                f"for the tensor '{name}' ({shard!r:.80})",
                "Do not use this model; its index was tampered with.",
            )
        if not shard.endswith(".safetensors"):
            raise FileFormatError(f"{index}: '{shard}' is not a safetensors file")
    return weight_map
