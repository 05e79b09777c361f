"""A release as one file: a tar whose bytes follow from the release alone.

Names are sorted, owners and times are zero, modes are alike. Whoever opens one is on guard: no
member may lie outside, none may be a link.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from mergekit_lite.errors import FileFormatError, PackError
from mergekit_lite.merge.writer import explained

__all__ = ["pack_archive", "unpack_archive"]


def pack_archive(folder: Path, path: Path) -> None:
    """Write a release into a tar, which appears when it is whole.

    Args:
        folder: Of the release; its version is the folder's name in the archive.
        path: Of the archive.

    Raises:
        PackError: It is there already, or the disk is full.
    """
    if path.exists():
        raise PackError(f"{path}: already exists", "Remove it first.")
    beside = path.with_name(f".{path.name}.partial")
    try:
        with explained(path), tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as archive:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = f"{folder.name}/{file.relative_to(folder).as_posix()}"
                info = tarfile.TarInfo(name)
                info.size = file.stat().st_size
                info.mode = 0o644
                with file.open("rb") as content:
                    archive.addfile(info, content)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def unpack_archive(path: Path, into: Path) -> Path:
    """Unpack a release.

    Returns:
        Its folder.

    Raises:
        FileFormatError: It is no archive of a release, or a hostile one.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            roots = {member.name.partition("/")[0] for member in members}
            if len(roots) != 1 or not all(member.isfile() for member in members):
                raise FileFormatError(
                    f"{path}: is no archive of a release", "It must hold one folder of plain files."
                )
            archive.extractall(into, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FileFormatError(
            f"{path}: cannot be unpacked ({error})", "Download it again."
        ) from None
    return into / roots.pop()
