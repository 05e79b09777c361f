"""PyTorch ``.bin`` checkpoints: mapped, with ``weights_only=True``, never unpickled freely.

Files written before PyTorch 1.6 are no zip archives and cannot be mapped; they are read whole.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergekit_lite.checkpoint.digest import as_bytes, sha256_of
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, Rows, TensorReader, TensorSpec
from mergekit_lite.checkpoint.safetensors import load_json
from mergekit_lite.dtypes import Array, by_config_name
from mergekit_lite.errors import FileFormatError, PackError

if TYPE_CHECKING:
    import torch

__all__ = ["PytorchCheckpoint", "pytorch_files"]


def pytorch_files(folder: Path) -> list[Path]:
    """The ``pytorch_model*.bin`` files of a folder, from its index where there is one."""
    index = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        return sorted(folder.glob("pytorch_model*.bin"))
    weight_map = load_json(index).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(s, str) and PurePosixPath(s).name == s for s in shards):
        raise FileFormatError(
            f"{index}: its 'weight_map' does not name files of this folder", "Download it again."
        )
    return [folder / shard for shard in sorted(set(shards))]


class _MappedReader(TensorReader):
    def __init__(self, tensor: torch.Tensor, spec: TensorSpec) -> None:
        self.spec = spec
        self._rows = tensor.detach().reshape(spec.rows, spec.columns)

    def read(self, rows: Rows, out: Array) -> None:
        import torch

        part = self._rows[rows.start : rows.stop]
        if part.numel():
            torch.frombuffer(as_bytes(out), dtype=part.dtype).view(part.shape).copy_(part)


class PytorchCheckpoint(Checkpoint):
    """Tensors of one or several PyTorch files, mapped into memory."""

    def __init__(self, files: Sequence[Path], folder: Path | None, label: str) -> None:
        self.label = label
        self.folder = folder
        config = folder / "config.json" if folder else None
        self.config = load_json(config) if config and config.is_file() else {}
        self._files = list(files)
        self._tensors: dict[str, torch.Tensor] = {}
        self._where: dict[str, str] = {}
        for path in files:
            for name, tensor in _load(path).items():
                if name in self._tensors:
                    raise FileFormatError(f"{path}: tensor '{name}' is also in another file")
                self._tensors[name] = tensor
                self._where[name] = path.name
        self._specs = {name: _spec(name, tensor, label) for name, tensor in self._tensors.items()}
        self._times = [path.stat() for path in files]

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self._specs[name]

    def file_of(self, name: str) -> str | None:
        """Name of the file that holds a tensor."""
        return self._where[name]

    def open(self, name: str) -> TensorReader:
        """Open a tensor for reading by rows."""
        return _MappedReader(self._tensors[name], self._specs[name])

    def fingerprint(self) -> str:
        """Names, sizes and times of all files."""
        pairs = zip(self._files, self._times, strict=True)
        return "\n".join(f"{path.name} {s.st_size} {s.st_mtime_ns}" for path, s in pairs)

    def input_files(self) -> list[InputFile]:
        """The files, hashed in a pass of their own since they are mapped and not read."""
        hashed = []
        for path, before in zip(self._files, self._times, strict=True):
            sha256 = sha256_of(path)
            now = path.stat()
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (
                before.st_ino,
                before.st_size,
                before.st_mtime_ns,
            ):
                raise PackError(
                    f"{path}: changed while it was being read",
                    "Wait until whatever writes it is done, then run again.",
                )
            hashed.append(InputFile(path.name, now.st_size, sha256))
        return hashed


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        import torch
    except ImportError:
        raise PackError(
            f"{path}: reading PyTorch files needs torch, which is not installed",
            "Run: pip install 'pack-models[torch]'",
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # addressed to whoever wrote the file
            state: Any = torch.load(
                os.fspath(path),
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),
            )
    except OSError as error:
        raise FileFormatError(
            f"{path}: cannot be read ({error.strerror or error})", "Download the file again."
        ) from None
    except Exception as error:
        # torch raises RuntimeError, UnpicklingError, KeyError, EOFError … for files it rejects
        raise FileFormatError(
            f"{path}: is no PyTorch file of plain tensors ({_reason(error)})",
            "pack never unpickles code. Convert the model to safetensors where you trust it.",
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise FileFormatError(f"{path}: is not a mapping from names to tensors")
    return state


def _reason(error: Exception) -> str:
    """What was found, without torch's advice to load the file unsafely."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return f"it calls for {named[1]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("Unsupported")] or lines
    return told[0][:200] if told else type(error).__name__


def _spec(name: str, tensor: torch.Tensor, label: str) -> TensorSpec:
    dtype = by_config_name(str(tensor.dtype))
    plain = not tensor.is_nested and str(tensor.layout) == "torch.strided"
    if dtype is None or not plain or tensor.device.type != "cpu":
        raise FileFormatError(
            f"{label}: tensor '{name}' is not plain data of a known type "
            f"({tensor.dtype}, {tensor.layout}, {tensor.device})"
        )
    return TensorSpec(tuple(tensor.shape), dtype)
