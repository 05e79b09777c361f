"""Results in a repository of the Hub: shards go up as large files, one commit shows all of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.errors import PackError
from mergekit_lite.merge.destination import LOCK, Piece
from mergekit_lite.release.hub import hub_error

__all__ = ["HubStore"]

_KEPT = frozenset({".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "README.md"})
"""Files that a repository may hold beside a result; they stay as they are."""


class HubStore:
    """The main branch of a model's repository; a new one is private.

    Args:
        repo: ``ORG/NAME``.
        card: Whether results have a README.md, which is then not one that may stay.
    """

    def __init__(self, repo: str, card: bool = False) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would run through ours
        self._api: Any = HfApi()
        self._repo = repo
        self._kept = _KEPT - {"README.md"} if card else _KEPT
        self._head: str | None = None

    def names(self) -> frozenset[str]:
        """The files of the branch, besides those that may stay."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            found = self._api.model_info(self._repo, revision="main")
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if getattr(error.response, "status_code", None) != 404:  # one that may not be seen
                raise
            return frozenset()
        self._head = found.sha
        return frozenset(file.rfilename for file in found.siblings or ()) - self._kept

    def read(self, name: str) -> bytes:
        """A small file of the branch."""
        path = self._api.hf_hub_download(self._repo, name, revision=self._head)
        return Path(path).read_bytes()

    def prepare(self) -> None:
        """Make the repository if it is not there: large files need one to go to."""
        if self._head is None:
            self._api.create_repo(self._repo, private=True, exist_ok=True)

    def upload(self, piece: Piece, save: Callable[[], None], stopped: threading.Event) -> None:
        """Send a file to the large-file storage, unless it is there; nobody sees it yet."""
        from huggingface_hub import CommitOperationAdd

        addition: Any = CommitOperationAdd(piece.name, str(piece.path))
        addition.upload_info.sha256 = bytes.fromhex(piece.sha256)
        self._api.preupload_lfs_files(self._repo, [addition])
        # What .gitattributes says is no large file is left for the commit.
        piece.state["done"] = "kept" if addition.path_or_fileobj else "up"

    def is_there(self, piece: Piece) -> bool:
        """Ask the large-file storage; it wants no file that it has."""
        from huggingface_hub.lfs import post_lfs_batch_info

        wanted, errors = post_lfs_batch_info(
            [_uploaded(piece).upload_info], token=None, repo_type="model", repo_id=self._repo
        )[:2]
        return not errors and not any(entry.get("actions") for entry in wanted)

    def discard(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Nothing: the Hub itself removes large files that no commit names."""

    def commit(
        self, pieces: Collection[Piece], files: Mapping[str, bytes], leftover: Collection[str]
    ) -> None:
        """One commit on the state that was checked; none if it is there already."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        lock = hashlib.sha256(files[LOCK]).hexdigest()
        if self._head is not None and self.began_to_commit(self.names(), lock):
            return
        operations: list[Any] = [
            _uploaded(piece)
            if piece.state["done"] == "up"
            else CommitOperationAdd(piece.name, str(piece.path))
            for piece in pieces
        ]
        operations += [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in leftover]
        self._api.create_commit(
            self._repo, operations, commit_message="Made with pack", parent_commit=self._head
        )

    def began_to_commit(self, names: Collection[str], lock_sha256: str) -> bool:
        """Whether the commit is there: its lock is."""
        return LOCK in names and hashlib.sha256(self.read(LOCK)).hexdigest() == lock_sha256

    def explained(self, error: Exception) -> PackError:
        """As everywhere else that the Hub is written to."""
        return hub_error(error, self._repo)

    def is_final(self, error: Exception) -> bool:
        """What the Hub refuses it refuses again."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        return status is not None and 400 <= status < 500 and status not in (408, 429)


def _uploaded(piece: Piece) -> Any:
    """An addition of a large file that is on the Hub and no longer here.

    The client offers this only while the object that was uploaded lives: it marks it, and empties
    it. A run that is continued has to make such an object anew, which takes two private fields.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition: Any = CommitOperationAdd(piece.name, b"")
    addition.upload_info = UploadInfo(
        size=piece.size, sample=b"", sha256=bytes.fromhex(piece.sha256)
    )
    addition._upload_mode = "lfs"  # noqa: SLF001
    addition._is_uploaded = True  # noqa: SLF001
    return addition
