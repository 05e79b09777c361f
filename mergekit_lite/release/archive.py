"""A release as one file: a tar, plain or in zstd, whose bytes follow from the release alone.

Names are sorted, owners and times are zero, modes are alike; zstd gives the same bytes for any
number of threads, for one version of its library. Whoever opens one is on guard: no member may lie
outside, none may be a link.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path
from typing import IO, Any

from mergekit_lite.errors import FileFormatError, PackError
from mergekit_lite.merge.writer import explained
from mergekit_lite.release.manifest import is_plain_path

__all__ = ["FORMATS", "pack_archive", "unpack_archive"]

FORMATS = ("tar", "tar.zst")
_LEVEL = 3
_ZSTD = b"\x28\xb5\x2f\xfd"
"""First bytes of a frame (RFC 8878, section 3.1.1)."""


def pack_archive(folder: Path, path: Path) -> None:
    """Write a release into a tar, which appears when it is whole.

    Args:
        folder: Of the release; its version is the folder's name in the archive.
        path: Of the archive; compressed if it ends with ``.zst``.

    Raises:
        PackError: It is there with other content, the disk is full, or zstandard is not installed.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with explained(path), _writing(beside, path.suffix == ".zst") as archive:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = f"{folder.name}/{file.relative_to(folder).as_posix()}"
                info = tarfile.TarInfo(name)
                info.size = file.stat().st_size
                info.mode = 0o644
                with file.open("rb") as content:
                    archive.addfile(info, content)
        if path.exists() and not cmp(beside, path, shallow=False):
            raise PackError(
                f"{path}: is there already, with other content",
                "Remove it, if it was made before the release was signed.",
            )
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path, compressed: bool) -> Iterator[tarfile.TarFile]:
    with path.open("wb") as raw:
        if not compressed:
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
                yield archive
            return
        compressor = _zstandard().ZstdCompressor(level=_LEVEL, threads=min(os.cpu_count() or 1, 8))
        with (
            compressor.stream_writer(raw, closefd=False) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            yield archive


def unpack_archive(path: Path, into: Path) -> Path:
    """Unpack a release.

    Returns:
        Its folder.

    Raises:
        FileFormatError: It is no archive of a release, or a hostile one.
        PackError: The disk is full, or zstandard is not installed.
    """
    roots: set[str] = set()
    try:
        with path.open("rb") as raw, explained(into):
            stream = _reading(raw)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    roots.add(member.name.partition("/")[0])
                    plain = is_plain_path(member.name) and "/" in member.name
                    if len(roots) != 1 or not member.isfile() or not plain:
                        raise FileFormatError(
                            f"{path}: is no archive of a release",
                            "It must hold one folder of plain files.",
                        )
                    content = archive.extractfile(member)
                    assert content is not None  # noqa: S101 (of a file it is there)
                    target = into / member.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with content, target.open("xb") as file:
                        shutil.copyfileobj(content, file, 1 << 20)
    except PackError:
        raise
    except Exception as error:  # whatever tarfile and zstandard find wrong
        raise FileFormatError(
            f"{path}: cannot be unpacked ({error})", "Download it again."
        ) from None
    if not roots:
        raise FileFormatError(f"{path}: is an empty archive", "Download it again.")
    return into / roots.pop()


def _reading(raw: IO[bytes]) -> IO[bytes]:
    head = raw.read(len(_ZSTD))
    raw.seek(0)
    if head != _ZSTD:
        return raw
    stream: IO[bytes] = _zstandard().ZstdDecompressor().stream_reader(raw)
    return stream


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise PackError(
            "archives in zstd need zstandard", "pip install 'pack-models[zstd]', or use a plain tar"
        ) from None
    return zstandard
