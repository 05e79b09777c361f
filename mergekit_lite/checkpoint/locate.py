"""From what a user writes (a folder, a file, a Hub id) to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.checkpoint.far.address import is_far
from mergekit_lite.checkpoint.hub import (
    HubReference,
    Listing,
    explained,
    fetch,
    fits_here,
    listing,
    parse_reference,
    pinned_at,
)
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.checkpoint.pytorch import PytorchCheckpoint, pytorch_files
from mergekit_lite.checkpoint.safetensors import INDEX_NAME, SafetensorsCheckpoint, load_json
from mergekit_lite.errors import PackError, nearest

__all__ = ["Source", "find_local", "looking", "not_found", "open_checkpoint"]

_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)


@dataclass(frozen=True)
class Source:
    """A checkpoint and where it came from.

    Attributes:
        reference: As the user wrote it.
        revision: Commit on the Hub; None for what lies on this disk.
        path: The folder or file on this disk.
        checkpoint: Its tensors.
        parts: What it is made of (a base and adapters); empty where it is one thing.
        notes: What the user should know of it.
    """

    reference: str
    revision: str | None
    path: Path
    checkpoint: Checkpoint
    parts: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Its parts, or itself."""
        return self.parts or (self,)


def find_local(reference: str, home: Path) -> Path | None:
    """Find a folder or file, relative to the recipe's folder or else to the current one."""
    path = Path(reference).expanduser()
    for candidate in [path] if path.is_absolute() else [home / path, path]:
        if candidate.exists():
            return candidate
    return None


def open_checkpoint(reference: str, home: Path) -> Source:
    """Open a model: a folder, a ``.safetensors``, ``.gguf`` or ``.bin`` file, a Hub id@revision.

    Or an address (``hf://``, ``s3://``, ``https://``), of a model that is read where it lies.

    Args:
        reference: As the user wrote it.
        home: Folder that relative paths start from; the current folder is tried next.

    Raises:
        PackError: There is nothing of that name, or it holds no weights.
    """
    local = find_local(reference, home)
    if local is not None:
        return Source(reference, None, local, _open_path(local, reference))
    if is_far(reference):
        return _open_far(reference)
    hub = parse_reference(reference)
    first = reference.partition("/")[0]
    if hub is None or find_local(first, home) is not None or reference.startswith((".", "/", "~")):
        raise PackError(
            not_found(reference, home), "Check the path; it starts from the recipe's folder."
        )
    return _open_hub(hub, reference)


@contextmanager
def looking() -> Iterator[None]:
    """Fetch no weights: models on the Hub are opened where they lie."""
    token = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(token)


def _open_hub(hub: HubReference, reference: str) -> Source:
    """A model of the Hub: fetched into its cache, or where it lies if that has no room for it."""
    with explained(hub):
        listed = listing(pinned_at(hub))
    whole = fits_here(hub, listed)
    streamed = all(name.endswith(".safetensors") for name in listed.weights)
    complete = len(listed.cached(hub)) == len(listed.weights)
    if streamed and not complete and (not whole or _LOOKING.get()):
        note = f"{reference}: read where it lies; the disk has no room for it"
        return _open_far(reference, None if whole else note, (hub, listed))
    if not listed.offline and not complete:
        with explained(hub):
            fetch(hub, listed)
    return Source(reference, listed.commit, listed.folder, _open_path(listed.folder, reference))


def _open_far(
    reference: str, note: str | None = None, listed: tuple[HubReference, Listing] | None = None
) -> Source:
    from mergekit_lite.checkpoint.far.locate import open_far, open_far_hub

    if listed is None:
        folder, commit, stored = open_far(reference)
    else:
        folder, commit, stored = open_far_hub(listed[0], reference, listed[1])
    try:
        _refuse_adapter(folder, reference)
        checkpoint = _with_codes(stored)
    except BaseException:
        stored.close()
        raise
    return Source(reference, commit, folder, checkpoint, notes=(note,) if note else ())


def not_found(reference: str, home: Path) -> str:
    """Say that nothing is there, and what is there of a similar name."""
    parent = (home / reference).parent
    siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    return f"{reference}: no such file or folder{nearest(Path(reference).name, siblings)}"


def _open_path(path: Path, label: str) -> Checkpoint:
    if path.is_dir():
        _refuse_cache_root(path, label)
        if (path / INDEX_NAME).is_file() or any(path.glob("*.safetensors")):
            _refuse_adapter(path, label)
            stored = SafetensorsCheckpoint(path, label)
            try:
                return _with_codes(stored)
            except BaseException:
                stored.close()
                raise
        files = pytorch_files(path)
        if files:
            return PytorchCheckpoint(files, path, label)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 or (ggufs and "-00001-of-" in ggufs[0].name):
            return _gguf(ggufs[0], label)
        raise PackError(
            f"{label}: holds no weights (*.safetensors or pytorch_model*.bin)",
            "Give the folder that holds the model's config.json and weights.",
        )
    if path.suffix == ".gguf":
        return _gguf(path, label)
    if path.suffix == ".onnx":
        raise PackError(
            f"{label}: is a graph of ONNX, of which no model is made",
            "Name the model that it was made of; pack eval and pack inspect read graphs.",
        )
    if path.suffix in {".bin", ".pt", ".pth"}:
        return PytorchCheckpoint([path], None, label)
    return SafetensorsCheckpoint(path, label)


def _refuse_adapter(path: Path, label: str) -> None:
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        wanted = load_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise PackError(
            f"{label}: is an adapter, not a whole model",
            f"Write it after its base: {wanted or 'BASE'}+{label}",
        )


def _with_codes(stored: SafetensorsCheckpoint) -> Checkpoint:
    """A checkpoint as it is, or of one that is quantized its floats."""
    if "quantization_config" not in stored.config:
        return stored
    from mergekit_lite.checkpoint.quantized import as_floats  # brings kernels

    return as_floats(stored)


def _gguf(path: Path, label: str) -> Checkpoint:
    from mergekit_lite.checkpoint.gguf import GgufCheckpoint  # brings the kernels of its blocks

    return GgufCheckpoint(path, label)


def _refuse_cache_root(path: Path, label: str) -> None:
    """A model's folder in the Hub's cache holds its revisions, not the model itself."""
    snapshots = path / "snapshots"
    if (path / "refs").is_dir() and snapshots.is_dir():
        found = sorted(p.name for p in snapshots.iterdir())
        raise PackError(
            f"{label}: is a folder of the Hub's cache, which holds revisions of a model",
            f"Give one of them: {label}/snapshots/{found[-1] if found else '…'}",
        )
