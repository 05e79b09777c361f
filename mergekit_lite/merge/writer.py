"""Output files that appear whole or not at all, and that a killed run can be continued from.

Everything is written into a hidden folder beside the final one. A finished shard is flushed to the
disk, renamed, and noted in a journal with its digest; the journal also holds the fingerprint of the
plan, so that only the same merge of the same inputs continues it. When all is there, the folder is
renamed. SHA-256 of every shard is computed as its bytes are written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.plan import Shard
from mergekit_lite.merge.segments import SegmentedFile

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.locate import Source

__all__ = [
    "ArtifactWriter", "OutputFile", "ShardFile", "check_place", "explained", "layers_of",
    "partial_of", "refuse_existing", "refuse_inputs", "refuse_uploaded", "write_durably",
]  # fmt: skip

_PASSING = 5
"""Shards that may be on the disk at a time while they are uploaded."""


def partial_of(final: Path) -> Path:
    """The hidden folder that a result is written to before it gets its name."""
    return final.parent / f".{final.name}.partial"


def journal_of(final: Path) -> Path:
    """The hidden file that notes which shards are finished."""
    return final.parent / f".{final.name}.journal"


def attempts_of(final: Path) -> Path:
    """The hidden folder in which other processes write shards of a result."""
    return final.parent / f".{final.name}.attempts"


def layers_of(final: Path) -> Path:
    """The hidden folder in which finished layers wait for the files of a result."""
    return final.parent / f".{final.name}.layers"


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of the file system into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PackError(
                f"{path}: the disk is full",
                "Free some space, then run the same command again; finished shards are kept.",
            ) from None
        if error.errno == errno.EFBIG:
            raise PackError(
                f"{error.filename or path}: is larger than the system allows a file to be",
                "Raise the limit (ulimit -f), or choose another disk: -o DIR",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PackError(
                f"{error.filename or path}: {error.strerror}",
                "Choose a folder that you may write to: -o DIR",
            ) from None
        raise PackError(f"{error.filename or path}: {error.strerror or error}") from None


class OutputFile:
    """A file of the result.

    Attributes:
        path: Relative to the result.
        size: In bytes.
        sha256: Of its content.
    """

    def __init__(self, path: str, size: int, sha256: str) -> None:
        self.path = path
        self.size = size
        self.sha256 = sha256


class ShardFile:
    """A shard that is being written, under a name of its own.

    Attributes:
        shard: What it is.
        path: Where it is written.
        left: Tensors that are not finished.
        nonfinite: Number of NaN and infinite elements, by tensor that has some.
    """

    def __init__(self, shard: Shard, path: Path) -> None:
        self.shard = shard
        self.path = path
        self.path.parent.mkdir(exist_ok=True)
        self.left = len(shard.header.entries)
        self.nonfinite: dict[str, int] = {}
        self.file = SegmentedFile(self.path, shard.size)
        self.file.write(0, np.frombuffer(shard.prefix, np.uint8))

    def write(self, name: str, offset: int, data: Array) -> None:
        """Write some elements of a tensor, ``offset`` bytes from its start; from any thread."""
        start = self.shard.header.entries[name].start + offset
        self.file.write(start, data.reshape(-1).view(np.uint8))

    def tensor_done(self, name: str, nonfinite: int) -> None:
        """All of a tensor is written; one call at a time."""
        self.left -= 1
        if nonfinite:
            self.nonfinite[name] = nonfinite

    def finish(self, final: Path) -> str:
        """Flush, close, rename; returns the digest."""
        sha256 = self.file.finish()
        self.path.rename(final)
        return sha256


class ArtifactWriter:
    """Writes the shards and small files of one result.

    Args:
        final: Folder that the result will have.
        shards: All output files.
        fingerprint: Of the plan.
        force: Whether an existing result is replaced.
        upload: Takes the result elsewhere; ``final`` is then only where it passes through.
        hold: Whether all of it stays here until it is published, to be looked at before.

    Raises:
        PackError: The result exists, is being written by another process, or does not fit.
    """

    def __init__(
        self,
        final: Path,
        shards: Sequence[Shard],
        fingerprint: str,
        force: bool,
        upload: Upload | None = None,
        hold: bool = False,
    ) -> None:
        self.final = final
        self.location = str(final) if upload is None else upload.location
        self.uploads = upload is not None
        self._upload = upload
        self._hold = hold
        self._force = force
        self.partial = partial_of(final)
        self._journal = journal_of(final)
        self._shards = {name: shard for shard in shards for name in shard.header.entries}
        self._all = shards
        self._fingerprint = fingerprint
        self._open: dict[str, ShardFile] = {}
        self._links: dict[str, OutputFile] = {}
        self._lock = threading.Lock()
        self._flush_failure: OSError | None = None
        self._lock_fd = -1
        if upload is None:
            refuse_existing(final, force)
        with explained(final):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._resume()
                self._check_space()
            except BaseException:
                self.close()
                raise

    def _take_lock(self) -> None:
        path = self.final.parent / f".{self.final.name}.lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it before may have removed the file that this descriptor means.
                current = path.exists() and path.stat().st_ino == os.fstat(fd).st_ino
            except OSError:
                os.close(fd)
                raise PackError(
                    f"{self.location}: another pack is writing it", "Wait for it, or stop it."
                ) from None
            if current:
                self._lock_fd, self._lock_path = fd, path
                return
            os.close(fd)

    def _resume(self) -> None:
        """Finished shards of an earlier run of the same plan; anything else is removed."""
        journal = _read_journal(self.final)
        same = journal.get("fingerprint") == self._fingerprint
        self.discarded = bool(journal) and not same
        shutil.rmtree(attempts_of(self.final), ignore_errors=True)
        done = self.done = dict(journal.get("shards", {})) if same else {}
        if self._upload is not None:
            state = journal.get("upload", {})
            self._upload.begin(
                state, done, self.partial, self._force, self._save_journal, self._hold
            )
        for shard in self._all if self._upload is None else ():
            path = self.partial / shard.name
            if shard.name in done and not (path.is_file() and path.stat().st_size == shard.size):
                del done[shard.name]
        for path in sorted(self.partial.rglob("*"), reverse=True):  # files before their folders
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # one that is not empty stays
                    path.rmdir()
            elif path.relative_to(self.partial).as_posix() not in done:
                path.unlink(missing_ok=self._upload is not None)

    def _check_space(self) -> None:
        sizes = sorted(shard.size for shard in self._all if shard.name not in self.done)
        # Of what is uploaded meanwhile a few shards are here at a time: some waiting, some open.
        need = sum(sizes if self._upload is None or self._hold else sizes[-_PASSING:])
        free = shutil.disk_usage(self.partial).free
        if need > free:
            place, hint = f"{self.final}: needs", "choose another disk: -o DIR"
            if self._upload is not None:
                place = f"{self.location}: needs on its way, in {self.final.parent},"
                hint = "start the command in a folder of another disk"
            raise PackError(
                f"{place} {need / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free",
                f"Free some space, or {hint}",
            )

    def write(self, name: str, offset: int, data: Array) -> None:
        """Write some elements of a tensor, ``offset`` bytes from its start; from any thread."""
        shard = self._shards[name]
        with explained(self.partial):
            if self._upload is not None and shard.name not in self._open:
                self._upload.wait_for_room()  # not under the lock, which the journal needs
            with self._lock:
                held = self._open.get(shard.name)
                if held is None:
                    held = self._begin(shard)
            held.write(name, offset, data)

    def link(self, name: str, source: Path, sha256: str) -> None:
        """Make a file that is there already one of the result, without a copy.

        Args:
            name: That it gets, below the result.
            source: Where it is.
            sha256: Of its content.

        Raises:
            PackError: It lies on another disk, or its file system has no links.
        """
        path = self.partial / name
        with explained(self.partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                os.link(source.resolve(), path)
            except OSError as error:
                raise PackError(
                    f"{source}: cannot be linked into {self.final} ({error.strerror})",
                    "Write the result to the disk of the model: -o DIR; or let it be copied: leave "
                    "--link-weights out.",
                ) from None
            self._links[name] = OutputFile(name, path.stat().st_size, sha256)

    def tensor_done(self, name: str, nonfinite: int) -> None:
        """All of a tensor is written; finishes its shard with the last one.

        Args:
            name: Of the tensor.
            nonfinite: How many of its elements are NaN or infinite.
        """
        shard = self._shards[name]
        with explained(self.partial):
            with self._lock:
                held = self._open.get(shard.name)
                if held is None:
                    held = self._begin(shard)
                held.tensor_done(name, nonfinite)
                if held.left:
                    return
            sha256 = held.finish(self.partial / shard.name)
            with self._lock:
                del self._open[shard.name]
                self._note(shard, sha256, held.nonfinite)
            if self._upload is not None:
                self._upload.add(shard.name, self.done[shard.name], self.partial)

    def _save_journal(self) -> None:
        with self._lock:
            self._write_journal()

    def _begin(self, shard: Shard) -> ShardFile:
        held = self._open[shard.name] = ShardFile(shard, self.partial / f"{shard.name}.part")
        return held

    def _note(self, shard: Shard, sha256: str, nonfinite: Mapping[str, int]) -> None:
        self.done[shard.name] = {
            "sha256": sha256, "bytes": shard.size, "nonfinite": dict(nonfinite),
        }  # fmt: skip
        self._write_journal()

    def missing(self) -> list[Shard]:
        """The shards that are not finished."""
        return [shard for shard in self._all if shard.name not in self.done]

    def missing_tensors(self) -> Iterator[str]:
        """Names of their tensors."""
        return (name for shard in self.missing() for name in shard.header.entries)

    def begin_attempts(self, run: str) -> Path:
        """Make the folder in which others write shards before they rename them into the result.

        It lies on the same disk. Who works for a run that is dead finds it gone when the next one
        begins, and can put nothing into the result any more.

        Args:
            run: A name that no other run has.
        """
        folder = attempts_of(self.final) / run
        with explained(self.final):
            folder.mkdir(parents=True)
        return folder

    def take(self, name: str, sha256: str, nonfinite: Mapping[str, int]) -> None:
        """Keep a shard that somebody else has finished and put in its place.

        Args:
            name: Of the shard.
            sha256: Of its content.
            nonfinite: Number of NaN and infinite elements, by tensor that has some.

        Raises:
            PackError: It is not there, or not of its size.
        """
        shard = next(shard for shard in self._all if shard.name == name)
        path = self.partial / name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            found = "is not there" if size is None else f"has {size} bytes"
            raise PackError(
                f"{path}: {found}, but was written with {shard.size} bytes by another process",
                "Choose a folder that all nodes share: -o DIR",
            )
        with explained(self.partial):
            with self._lock:
                self._note(shard, sha256, nonfinite)
            if self._upload is not None:
                self._upload.add(name, self.done[name], self.partial)

    def _write_journal(self) -> None:
        journal: dict[str, Any] = {"fingerprint": self._fingerprint, "shards": self.done}
        if self._upload is not None:
            journal["upload"] = self._upload.state
        write_durably(self._journal, json.dumps(journal).encode())

    def finish_upload(self) -> None:
        """Have all shards of a result that goes elsewhere sent, before any result is published."""
        if self._upload is not None:
            with explained(self.partial):
                self._upload.finish()

    def publish(self, files: Mapping[str, bytes]) -> list[OutputFile]:
        """Add small files and give the result its name.

        Args:
            files: Contents by name.

        Returns:
            Every file of the result, sorted by name.
        """
        outputs = self.outputs(files)
        if self._upload is not None:
            with explained(self.partial):
                self._upload.commit(files)
            self._journal.unlink(missing_ok=True)
            shutil.rmtree(self.partial)
            shutil.rmtree(layers_of(self.final), ignore_errors=True)
            return outputs
        with explained(self.final):
            for name, content in files.items():
                write_durably(self.partial / name, content)
            for path in self.partial.rglob("*"):
                if path.is_dir():
                    sync_folder(path)
            sync_folder(self.partial)
            replace_folder(self.partial, self.final)
            self._journal.unlink(missing_ok=True)
        # Also those of a run that was stopped, and of another format than what is there now.
        shutil.rmtree(layers_of(self.final), ignore_errors=True)
        return outputs

    def outputs(self, files: Mapping[str, bytes]) -> list[OutputFile]:
        """The shards, and small files that will be added, with their digests."""
        found = [OutputFile(n, d["bytes"], d["sha256"]) for n, d in self.done.items()]
        found += self._links.values()
        found += [OutputFile(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in files.items()]
        return sorted(found, key=lambda f: f.path)

    def abort(self) -> None:
        """Wake every thread that waits to write; called when the run ends early."""
        if self._upload is not None:
            self._upload.abort()
        for held in list(self._open.values()):
            held.file.abort()

    def close(self) -> None:
        """Close all files; what is unfinished stays for the next run."""
        if self._upload is not None:
            self._upload.close()
        for held in self._open.values():
            held.file.close()
        if self._lock_fd >= 0:
            shutil.rmtree(attempts_of(self.final), ignore_errors=True)
            if self._upload is not None:
                with contextlib.suppress(OSError):  # it holds something for the next run
                    self.partial.rmdir()
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1
            if self._upload is not None:
                self._upload.clean()


def _read_journal(final: Path) -> dict[str, Any]:
    """What an earlier run noted; empty if there was none."""
    journal: Any = {}
    with contextlib.suppress(OSError, ValueError):
        journal = json.loads(journal_of(final).read_text("utf-8"))
    return journal if isinstance(journal, dict) else {}


def refuse_uploaded(upload: Upload, force: bool) -> None:
    """Check that a result may go elsewhere, before anything is read for it.

    Raises:
        PackError: Something is there and must not be replaced, or the place cannot be reached.
    """
    upload.refuse_existing(_read_journal(upload.folder).get("upload", {}), force)


def check_place(final: Path, upload: Upload | None, sources: Iterable[Source], force: bool) -> None:
    """Check that a result may go where it is to go.

    Args:
        final: Folder that it will have.
        upload: Takes it elsewhere; None if it stays in that folder.
        sources: What it is made from.
        force: Whether an existing result is replaced.

    Raises:
        PackError: Something is in the folder, or an input lies there. What is elsewhere is looked
            at when the writer begins.
    """
    if upload is not None:
        upload.refuse_inputs(source.reference for source in sources)
        return
    refuse_existing(final, force)
    refuse_inputs(final, (source.path for source in sources))


def refuse_existing(final: Path, force: bool) -> None:
    """Check that a result may be written under this name.

    Raises:
        PackError: Something is there and must not be replaced.
    """
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise PackError(f"{final}: is not a folder", "Choose another: -o DIR")
    if final.is_dir() and any(final.iterdir()) and not force:
        raise PackError(
            f"{final}: already exists", "Replace it with --force, or choose another: -o DIR"
        )
    if final.is_dir() and any(final.iterdir()) and (foreign := _foreign(final)):
        raise PackError(
            f"{final}: holds '{foreign}', which pack did not write there; --force would delete it",
            "Move it away, or choose another folder: -o DIR",
        )


def _foreign(folder: Path) -> str | None:
    """A file of a result's folder that its lock does not list."""
    listed = {"pack.lock"}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        lock = json.loads((folder / "pack.lock").read_text("utf-8"))
        listed |= {entry["path"] for entry in lock["outputs"]}
    found = (str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if not p.is_dir())
    return next((name for name in found if name not in listed), None)


def refuse_inputs(final: Path, inputs: Iterable[Path]) -> None:
    """Check that a result does not take the place of what it is made from.

    Raises:
        PackError: The final folder is, or holds, an input.
    """
    target = final.resolve()
    for path in inputs:
        source = path.resolve()
        if target == source or target in source.parents:
            raise PackError(
                f"{final}: holds the input {path}, which would be lost",
                "Choose another folder: -o DIR",
            )


def replace_folder(made: Path, final: Path) -> None:
    """Give a finished folder its final name; what was there is removed only afterwards."""
    old = final.parent / f".{final.name}.old"
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    made.rename(final)
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file whole: beside its name, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names onto the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
