"""MANIFEST.json: every file of a release with its digest; its own digest is that of the release."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mergekit_lite.errors import FileFormatError
from mergekit_lite.merge.config import to_json

__all__ = [
    "MANIFEST",
    "SIGNATURE",
    "TEMPLATE",
    "Entry",
    "is_plain_path",
    "make_manifest",
    "media_type",
    "read_manifest",
    "read_object",
]

MANIFEST = "MANIFEST.json"
SIGNATURE = "model.sig"
TEMPLATE = "card.md.jinja"
"""A template of the author's own, as it lies in a release."""
_VERSION = 1
_LARGEST = 64 << 20
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_RELEASED = re.compile(r"[0-9][0-9A-Za-z.+-]{0,160}")
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


def is_plain_path(name: object) -> bool:
    """Whether a name from outside is that of a file below a folder, in its one usual form."""
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def make_manifest(name: str, version: str, entries: Sequence[Entry]) -> bytes:
    """The manifest, in its one canonical form: sorted, the same bytes for the same files."""
    files = [
        {"path": e.path, "bytes": e.size, "sha256": e.sha256, "media_type": media_type(e.path)}
        for e in sorted(entries, key=lambda entry: entry.path)
    ]
    return to_json({"manifest_version": _VERSION, "name": name, "version": version, "files": files})


def read_object(path: Path) -> Mapping[str, Any]:
    """An object of JSON; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, Entry], str]:
    """A manifest's contents, its entries by path, and the digest of the release.

    Raises:
        FileFormatError: It is missing, broken, or names files outside the release.
    """
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise FileNotFoundError
        raw = path.read_bytes()
        document = json.loads(raw, object_pairs_hook=_once)
        listed = [Entry(str(f["path"]), int(f["bytes"]), str(f["sha256"]))
                  for f in document["files"]]  # fmt: skip
        title, version = str(document["name"]), str(document["version"])
    except OSError:
        raise FileFormatError(f"{path}: is not there", "Give the folder of a release.") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: is no manifest of a release ({type(error).__name__})", "Download it again."
        ) from None
    if not _TITLE.fullmatch(title) or not _RELEASED.fullmatch(version):
        raise FileFormatError(
            f"{path}: is of a release that cannot be called so ({title!r:.80}, {version!r:.40})",
            "Do not use it.",
        )
    entries = {entry.path: entry for entry in listed}
    for name in entries:
        if not is_plain_path(name) or name in (MANIFEST, SIGNATURE):
            raise FileFormatError(
                f"{path}: names a file outside the release ({name!r:.80})", "Do not use it."
            )
    if len(entries) != len(listed):
        raise FileFormatError(f"{path}: names a file twice", "Do not use it.")
    return document, entries, hashlib.sha256(raw).hexdigest()
