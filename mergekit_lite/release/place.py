"""Where a release is: a folder, an archive, an OCI layout, a registry, or the Hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.errors import PackError
from mergekit_lite.release.archive import unpack_archive
from mergekit_lite.release.oci import is_layout, unpack_layout
from mergekit_lite.release.push_oci import pull_image

__all__ = ["Place", "placed"]

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_OCI = "oci://"


@dataclass(frozen=True)
class Place:
    """A release that can be read.

    Attributes:
        folder: Of its files.
        links_into: Folder that files may be links into; None where they may not be links.
        ignored: Files that a host adds of its own.
    """

    folder: Path
    links_into: Path | None = None
    ignored: frozenset[str] = frozenset()


@contextmanager
def placed(word: str) -> Iterator[Place]:
    """Find a release; what had to be unpacked or fetched for it is removed afterwards.

    Args:
        word: A folder, a ``.tar`` or ``.tar.zst``, an OCI image layout, ``oci://REGISTRY/NAME:TAG``,
            or ``org/name[@revision]`` on the Hub, where it is kept in the Hub's own cache.

    Raises:
        PackError: It is not there, or no release.
    """
    path = Path(word)
    if path.is_dir() and not is_layout(path):
        yield Place(path)
        return
    near = Path(word.partition("/")[0]).exists()  # a path with a mistake, no name on the Hub
    found = None if near or path.exists() or word.startswith(_OCI) else _HUB.fullmatch(word)
    if found is not None:
        yield _fetched(found["repo"], found["revision"])
        return
    if not path.exists() and not word.startswith(_OCI):
        raise PackError(
            f"{word}: is not there",
            "Give a release: a folder, an archive, org/name on the Hub, or oci://REGISTRY/NAME:TAG",
        )
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=_beside(path)) as scratch:
        into = Path(scratch)
        if word.startswith(_OCI):
            yield Place(pull_image(word.removeprefix(_OCI), into))
        elif path.is_dir():
            yield Place(unpack_layout(path, into))
        else:
            yield Place(unpack_archive(path, into))


def _beside(path: Path) -> Path | None:
    """The folder of a file, whose disk has room for such files; None for the system's own."""
    folder = path.absolute().parent
    return folder if folder.is_dir() and os.access(folder, os.W_OK) else None


def _fetched(repo: str, revision: str | None) -> Place:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision))
    except Exception as error:  # whatever the client raises
        raise PackError(
            f"{repo}{f'@{revision}' if revision else ''}: cannot be fetched from the Hub "
            f"({type(error).__name__})",
            "Check the name, the revision and the network; for a private repository: hf auth login",
        ) from None
    return Place(folder, folder.parents[1], frozenset({".gitattributes"}))
