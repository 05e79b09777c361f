"""A release as an OCI artifact: an image layout on disk, or pushed to a registry.

A layer for each file, as it is, so that registries and nodes share what does not change, and any
OCI client can pull it. Sources of the formats: OCI image specification 1.1 (image-layout,
manifest), OCI distribution specification 1.1, and the CNCF ModelPack specification (media types,
annotations, config). Nothing in it tells one run from another; it has a time of creation only where
``SOURCE_DATE_EPOCH`` gives one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mergekit_lite.errors import FileFormatError, PackError
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.writer import explained
from mergekit_lite.release.manifest import MANIFEST, SIGNATURE, is_plain_path, read_manifest
from mergekit_lite.release.writer import link_or_copy, new_folder

__all__ = ["Blob", "Image", "describe_image", "is_layout", "unpack_layout", "write_layout"]

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG = "application/vnd.cncf.model.config.v1+json"
_KINDS = {
    "weight": (".safetensors", ".gguf", ".onnx", ".onnx_data", ".bin", ".data"),
    "doc": (".md", ".txt", ".svg", ".png", ".cdx.json", ".intoto.json", ".sig"),
    "code": (".sh", ".py"),
}
_SMALL = 64 << 20
_PATH = "org.cncf.model.filepath"
_TITLE = "org.opencontainers.image.title"
"""What clients that know no models, such as oras, name a file by."""


@dataclass(frozen=True)
class Blob:
    """Content of an image, by its digest.

    Attributes:
        digest: ``sha256:…``.
        size: In bytes.
        media_type: Of the content.
        path: Of the file that holds it; None where `content` does.
        name: Of the file within the release; empty for the config.
        content: Of the config.
    """

    digest: str
    size: int
    media_type: str
    path: Path | None = None
    name: str = ""
    content: bytes = b""

    def descriptor(self) -> dict[str, Any]:
        """As manifests name it."""
        named = {"annotations": {_PATH: self.name, _TITLE: self.name}} if self.name else {}
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **named}


@dataclass(frozen=True)
class Image:
    """A release as an OCI artifact.

    Attributes:
        tag: The version.
        manifest: Its bytes.
        blobs: The config first, then every file.
    """

    tag: str
    manifest: bytes
    blobs: tuple[Blob, ...]

    @property
    def digest(self) -> str:
        """Of the manifest: what the artifact is pulled by."""
        return _digest(self.manifest)


def describe_image(folder: Path) -> Image:
    """What a release is as an OCI artifact; of its files only the small ones are read.

    Args:
        folder: Of the release. Weights are taken for what the manifest says.

    Raises:
        FileFormatError: It is no release.
    """
    document, entries, digest = read_manifest(folder / MANIFEST)
    files = [
        Blob(f"sha256:{e.sha256}", e.size, _media_type(e.path), folder / e.path, e.path)
        for _, e in sorted(entries.items())
    ]
    for name in (MANIFEST, SIGNATURE):
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            files.append(Blob(_digest(content), len(content), _media_type(name), path, name))
    config = to_json(_config(folder, document, files))
    first = Blob(_digest(config), len(config), _CONFIG, content=config)
    licences = _licences(folder)
    manifest = to_json({
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "artifactType": _ARTIFACT,
        "config": first.descriptor(),
        "layers": [blob.descriptor() for blob in files],
        "annotations": {
            "org.opencontainers.image.title": str(document["name"]),
            "org.opencontainers.image.version": str(document["version"]),
            **({"org.opencontainers.image.licenses": licences} if licences else {}),
            **({"org.opencontainers.image.created": created} if (created := _created()) else {}),
            "pack.release.digest": f"sha256:{digest}",
        },
    })  # fmt: skip
    return Image(str(document["version"]).replace("+", "_"), manifest, (first, *files))


def _config(folder: Path, document: Mapping[str, Any], files: list[Blob]) -> dict[str, Any]:
    """The model's config by ModelPack: what runtimes choose by."""
    path = folder / "config.json"
    model = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    ggufs = [blob for blob in files if blob.name.endswith(".gguf")]
    whole = any(blob.name.endswith(".safetensors") for blob in files)
    kept = {
        "architecture": str(model.get("model_type") or ""),
        "format": "safetensors" if whole else "gguf" if ggufs else "",
        "precision": str(model.get("dtype") or model.get("torch_dtype") or ""),
    }
    descriptor = {
        "name": str(document["name"]),
        "version": str(document["version"]),
        **({"createdAt": created} if (created := _created()) else {}),
        **({"licenses": [licence]} if (licence := _licences(folder)) else {}),
    }
    return {
        "descriptor": descriptor,
        "config": {key: value for key, value in kept.items() if value},
        "modelfs": {"type": "layers", "diffIds": [blob.digest for blob in files]},
    }


def _created() -> str | None:
    """The time that everything was made, where reproducible builds give one."""
    stated = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not stated.isdigit():
        return None
    return datetime.fromtimestamp(int(stated), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _licences(folder: Path) -> str:
    """The licence by the bill of materials, which has SPDX's id where there is one."""
    path = folder / "sbom.cdx.json"
    bill = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    stated = bill.get("metadata", {}).get("component", {}).get("licenses") or [{}]
    licence = stated[0].get("license", {})
    return str(licence.get("id") or licence.get("name") or "")


def _media_type(name: str) -> str:
    plain = name.rpartition("/")[2]
    if plain in ("LICENSE", "NOTICE", MANIFEST) or name.startswith("licenses/"):
        return "application/vnd.cncf.model.doc.v1.raw"
    for kind, endings in _KINDS.items():
        if plain.endswith(endings):
            return f"application/vnd.cncf.model.{kind}.v1.raw"
    return "application/vnd.cncf.model.weight.config.v1.raw"


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def write_layout(folder: Path, path: Path) -> Image:
    """Write a release as an OCI image layout, whose blobs are links to its files.

    Args:
        folder: Of the release.
        path: Of the layout; it appears when it is whole.

    Raises:
        PackError: It is there already, or the disk is full.
    """
    image = describe_image(folder)
    if (path / "blobs" / "sha256" / image.digest.removeprefix("sha256:")).is_file():
        return image
    if path.exists():
        raise PackError(
            f"{path}: is there already, with other content",
            "Remove it, if it was made before the release was signed.",
        )
    with new_folder(path) as partial, explained(path):
        blobs = partial / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for blob in image.blobs:
            target = blobs / blob.digest.removeprefix("sha256:")
            if target.exists():
                continue
            if blob.path is None:
                target.write_bytes(blob.content)
            else:
                link_or_copy(blob.path, target)
        (blobs / image.digest.removeprefix("sha256:")).write_bytes(image.manifest)
        (partial / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        entry = {
            "mediaType": _MANIFEST, "artifactType": _ARTIFACT, "digest": image.digest,
            "size": len(image.manifest),
            "annotations": {"org.opencontainers.image.ref.name": image.tag},
        }  # fmt: skip
        (partial / "index.json").write_bytes(to_json({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry],
        }))  # fmt: skip
    return image


def is_layout(folder: Path) -> bool:
    """Whether a folder is an OCI image layout."""
    return (folder / "oci-layout").is_file()


def unpack_layout(layout: Path, into: Path) -> Path:
    """The files of an image layout under their names, as links where that can be.

    Returns:
        Their folder.

    Raises:
        FileFormatError: It is no layout of one release, or a hostile one.
    """
    try:
        index = json.loads((layout / "index.json").read_bytes())
        [entry] = index["manifests"]
        manifest = json.loads(_blob(layout, entry["digest"]).read_bytes())
        named = [(layer["annotations"][_PATH], layer["digest"]) for layer in manifest["layers"]]
        _check_blob(layout, entry["digest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise FileFormatError(
            f"{layout}: is no image layout of a release ({type(error).__name__})",
            "Write it again: pack release --oci",
        ) from None
    for name, digest in named:
        if not is_plain_path(name):
            raise FileFormatError(f"{layout}: names a file outside: {name!r:.80}", "Do not use it.")
        source, target = _blob(layout, digest), into / name
        if source.is_file() and not source.is_symlink():
            _check_blob(layout, digest)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(source, target)
            except (FileExistsError, NotADirectoryError):
                raise FileFormatError(
                    f"{layout}: names a file twice: {name!r:.80}", "Do not use it."
                ) from None
    return into


def _check_blob(layout: Path, digest: str) -> None:
    """A small blob has its digest; large ones are weights, which the manifest has digests of.

    Raises:
        FileFormatError: It has not.
    """
    path = _blob(layout, digest)
    if path.stat().st_size <= _SMALL and _digest(path.read_bytes()) != digest:
        raise FileFormatError(f"{layout}: {digest} has other content", "Get it again.")


def _blob(layout: Path, digest: str) -> Path:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", str(digest)):
        raise FileFormatError(f"{layout}: has no such digest ({digest!r:.90})", "Do not use it.")
    return layout / "blobs" / "sha256" / str(digest).removeprefix("sha256:")
