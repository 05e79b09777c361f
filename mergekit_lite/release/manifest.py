"""MANIFEST.json: every file of a release with its digest; its own digest is that of the release."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.errors import FileFormatError
from mergekit_lite.merge.config import to_json

__all__ = ["MANIFEST", "SIGNATURE", "Entry", "make_manifest", "media_type", "read_manifest"]

MANIFEST = "MANIFEST.json"
SIGNATURE = "model.sig"
_VERSION = 1
_TYPES = {
    ".safetensors": "application/vnd.safetensors",
    ".gguf": "application/vnd.gguf",
    ".json": "application/json",
    ".md": "text/markdown",
    ".yaml": "application/yaml",
    ".jinja": "text/plain",
    ".txt": "text/plain",
    ".sh": "text/x-shellscript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".lock": "application/json",
}


@dataclass(frozen=True)
class Entry:
    """One file of a release.

    Attributes:
        path: Within the release, with slashes.
        size: In bytes.
        sha256: Of its content.
    """

    path: str
    size: int
    sha256: str


def media_type(path: str) -> str:
    """What a file is, by its name."""
    suffix = Path(path).suffix
    return _TYPES.get(suffix, "text/plain" if not suffix else "application/octet-stream")


def make_manifest(name: str, version: str, entries: Sequence[Entry]) -> bytes:
    """The manifest, in its one canonical form: sorted, the same bytes for the same files."""
    files = [
        {"path": e.path, "bytes": e.size, "sha256": e.sha256, "media_type": media_type(e.path)}
        for e in sorted(entries, key=lambda entry: entry.path)
    ]
    return to_json({"manifest_version": _VERSION, "name": name, "version": version, "files": files})


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, Entry], str]:
    """A manifest's contents, its entries by path, and the digest of the release.

    Raises:
        FileFormatError: It is missing, broken, or names files outside the release.
    """
    try:
        raw = path.read_bytes()
        document = json.loads(raw)
        entries = {
            str(f["path"]): Entry(str(f["path"]), int(f["bytes"]), str(f["sha256"]))
            for f in document["files"]
        }
    except OSError:
        raise FileFormatError(f"{path}: is not there", "Give the folder of a release.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: is no manifest of a release ({type(error).__name__})", "Download it again."
        ) from None
    for name in entries:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise FileFormatError(
                f"{path}: names a file outside the release ({name!r:.80})", "Do not use it."
            )
    return document, entries, hashlib.sha256(raw).hexdigest()
