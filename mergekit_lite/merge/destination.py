"""Results that go to S3 or to the Hub while they are made.

A finished shard is handed to one thread that uploads it and then deletes it here, so the disk holds
a few shards at a time. What is uploaded is visible to nobody until `Upload.commit`. The journal of
the writer notes what has gone up, so a run that was killed neither computes nor sends it again.
Where a result is looked at as a whole before it is called one, finished shards are *held*: they
stay here, and go up at the end.

What S3 and the Hub do differently is a `Store` each; a local result imports neither library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mergekit_lite.errors import Interrupted, PackError
from mergekit_lite.merge.address import SCRATCH, Address

__all__ = ["LOCK", "Missing", "Piece", "Store", "Upload", "open_upload"]

LOCK = "pack.lock"
WAITING = 2
"""Finished shards, the one being uploaded among them, from which on no other is begun."""
PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each further attempt; the libraries have tried several times by then."""
LINGER = 10.0
"""Seconds that what is under way has to end in, when a run is stopped."""
_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Piece:
    """A finished shard.

    Attributes:
        name: Below the result.
        path: Where it lies here; gone once it is uploaded.
        size: In bytes.
        sha256: Of its content.
        state: What the store notes of it, for this run and those that continue it.
    """

    name: str
    path: Path
    size: int
    sha256: str
    state: dict[str, Any]


class Missing(Exception):
    """What was uploaded by an earlier run is not there any more."""


class Store(Protocol):
    """A place that keeps uploads invisible until they are committed."""

    def names(self) -> frozenset[str]:
        """The files that are visible there now and would be in the way of a result."""

    def read(self, name: str) -> bytes:
        """A small file of the result that is there."""

    def prepare(self) -> None:
        """Make ready for uploads; called once, when it is known that a result may go there."""

    def upload(self, piece: Piece, save: Callable[[], None], stopped: threading.Event) -> None:
        """Upload a shard, or the rest of it.

        Its state then says ``done``: ``up``, or ``kept`` if the file is needed for the commit. It
        says ``again`` from the start if an earlier run may have begun.

        Args:
            piece: The shard.
            save: Notes its state durably.
            stopped: Set when the run ends early.
        """

    def is_there(self, piece: Piece) -> bool:
        """Whether what an earlier run uploaded of a shard can still be committed."""

    def discard(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Remove uploads, by the name of their shard, that nobody will commit."""

    def commit(
        self, pieces: Collection[Piece], files: Mapping[str, bytes], leftover: Collection[str]
    ) -> None:
        """Make everything visible, the lock last; what is done already is not done again.

        Args:
            pieces: All shards, uploaded.
            files: Small files, the lock among them.
            leftover: Files of the former result that the new one does not have.
        """

    def explained(self, error: Exception) -> PackError:
        """An error of the library, without what may hold credentials."""

    def is_final(self, error: Exception) -> bool:
        """Whether it is useless to try again."""

    def began_to_commit(self, names: Collection[str], lock_sha256: str) -> bool:
        """Whether files that are there are those of this result, of a run that was killed."""


class Upload:
    """Takes finished shards to a store, one at a time, in the background.

    Args:
        address: Where they go.
        store: Of that place.
    """

    def __init__(self, address: Address, store: Store) -> None:
        self._address = address
        self.location = str(address)
        self.folder = address.scratch
        self._store = store
        self._states: dict[str, dict[str, Any]] = {}
        self._ours: dict[str, Any] = {}
        self._pieces: dict[str, Piece] = {}
        self._held: list[Piece] = []
        self._hold = False
        self._force = False
        self._save: Callable[[], None] = lambda: None
        self._waiting: deque[Piece] = deque()
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._ending = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> dict[str, Any]:
        """For the journal."""
        # Copies: the thread that uploads changes them while the journal is written.
        states = {name: dict(state) for name, state in list(self._states.items())}
        return {"uploads": states, "ours": self._ours}

    def again(self) -> Upload:
        """Another for the same place, for a run that begins afresh after this one was closed."""
        return Upload(self._address, self._store)

    def refuse_existing(self, state: Mapping[str, Any], force: bool) -> None:
        """Check that the place can be reached, and that nothing is in the way; writes nothing.

        Args:
            state: From the journal of an earlier run; empty if there was none.
            force: Whether an existing result is replaced.

        Raises:
            PackError: Something is there already, or the store cannot be used.
        """
        self._force, self._ours = force, dict(state.get("ours", {}))
        with self._translated():
            self._refuse(same=True)

    def refuse_inputs(self, references: Iterable[str]) -> None:
        """Check that a result does not take the place of what it is made from.

        Args:
            references: Of the models that go in.

        Raises:
            PackError: One of them is there.
        """
        own = self.location.removeprefix("hf://")
        for reference in references:
            name = reference.removeprefix("hf://").partition("@")[0].rstrip("/")
            if name == own or name.startswith(f"{own}/"):
                raise PackError(
                    f"{self.location}: holds the input {reference}, which would be lost",
                    "Choose another place: -o WHERE",
                )

    def begin(
        self,
        state: Mapping[str, Any],
        done: dict[str, dict[str, Any]],
        folder: Path,
        force: bool,
        save: Callable[[], None],
        hold: bool = False,
    ) -> None:
        """Go on where an earlier run stopped.

        Args:
            state: From its journal.
            done: The shards that it finished for this plan; those that are lost are removed.
            folder: That shards are written to.
            force: Whether an existing result is replaced.
            save: Writes the journal.
            hold: Whether all shards stay here, and go up at the end.

        Raises:
            PackError: Something is there already, or the store cannot be used.
        """
        self._force, self._save, self._hold = force, save, hold
        self._ours = dict(state.get("ours", {}))
        states = {name: dict(found) for name, found in dict(state.get("uploads", {})).items()}
        with self._translated():
            self._refuse(same=bool(done))
            self._store.prepare()
            for name in list(done):
                piece = self._piece(name, done[name], folder, states.get(name, {}))
                there = piece.path.is_file() and piece.path.stat().st_size == piece.size
                enough = there or not hold  # what is looked at must lie here
                if enough and piece.state.get("done") == "up" and self._store.is_there(piece):
                    self._states[name] = states.pop(name)
                elif there:
                    piece.state.pop("done", None)
                    piece.state["again"] = True
                    self._states[name] = piece.state
                    states.pop(name, None)
                    self._queue(piece)
                else:
                    del done[name], self._pieces[name]
            self._store.discard(states)
            save()
        self._start()

    def wait_for_room(self) -> None:
        """Wait before another shard is begun while too many are finished and not yet uploaded."""
        with self._changed:
            while self._failure is None and len(self._waiting) >= WAITING:
                self._changed.wait()
            self._check()

    def add(self, name: str, shard: Mapping[str, Any], folder: Path) -> None:
        """Upload a finished shard, or hold it; returns at once."""
        state = self._states[name] = {}
        piece = self._piece(name, shard, folder, state)
        with self._changed:
            self._check()
            self._queue(piece)
            self._changed.notify_all()

    def _queue(self, piece: Piece) -> None:
        (self._held if self._hold else self._waiting).append(piece)

    def finish(self) -> None:
        """Have all shards go up, those that were held too; `commit` then has little left to do.

        Raises:
            PackError: It could not; the same command goes on from there.
            Interrupted: The user stopped it.
        """
        try:
            with self._changed:
                self._waiting += self._held
                self._held = []
            self._wait()
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None

    def commit(self, files: Mapping[str, bytes]) -> None:
        """Have all shards go up, then make the result visible.

        Args:
            files: Its small files, the lock among them.

        Raises:
            PackError: It could not; the same command goes on from there.
            Interrupted: The user stopped it.
        """
        self.finish()
        try:
            with self._translated():
                there = self._refuse(same=True)
                names = {*self._pieces, *files}
                self._ours = {
                    "names": sorted(there | names),
                    "lock": hashlib.sha256(files[LOCK]).hexdigest(),
                }
                self._save()
                pieces = [self._pieces[name] for name in sorted(self._pieces)]
                try:
                    self._store.commit(pieces, files, sorted(there - names))
                except Missing as lost:
                    self._states.pop(str(lost), None)
                    self._save()
                    raise PackError(
                        f"{self.location}: the upload of {lost} is gone",
                        "Run the same command again; only that file is made again.",
                    ) from None
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None

    def clean(self) -> None:
        """Remove the folders here that are empty, as they are after a commit and a refusal."""
        for folder in (SCRATCH, SCRATCH.parent):
            with contextlib.suppress(OSError):  # others are there
                folder.rmdir()

    def abort(self) -> None:
        """Wake whoever waits here; what is under way ends soon."""
        self._stopped.set()
        with self._changed:
            self._failure = self._failure or PackError("stopped")
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; does not wait for an upload that cannot be stopped."""
        self.abort()
        with self._changed:
            self._closed = True
            self._save = lambda: None
        if self._thread is not None:
            self._thread.join(LINGER)

    def _piece(
        self, name: str, shard: Mapping[str, Any], folder: Path, state: dict[str, Any]
    ) -> Piece:
        piece = Piece(name, folder / name, shard["bytes"], shard["sha256"], state)
        self._pieces[name] = piece
        return piece

    def _refuse(self, same: bool) -> frozenset[str]:
        """The files that are there, if they may be replaced.

        Args:
            same: Whether the run that is continued was of the same plan.
        """
        there = self._store.names()
        ours = frozenset(self._ours.get("names", ()))
        if not there:
            return there
        if (
            ours
            and (same or LOCK not in there)
            and self._store.began_to_commit(there, self._ours["lock"])
        ):
            foreign = there - ours
        elif not self._force:
            raise PackError(
                f"{self.location}: already exists",
                "Replace it with --force, or choose another place: -o WHERE",
            )
        else:
            foreign = there - self._listed(there)
        if foreign:
            raise PackError(
                f"{self.location}: holds '{min(foreign)}', which pack did not write there; "
                "--force would delete it",
                "Move it away, or choose another place: -o WHERE",
            )
        return there

    def _listed(self, there: frozenset[str]) -> frozenset[str]:
        listed = {LOCK}
        if LOCK in there:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                lock = json.loads(self._store.read(LOCK))
                listed |= {entry["path"] for entry in lock["outputs"]}
        return frozenset(listed)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="pack-upload", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while (piece := self._next()) is not None:
                self._send(piece)
                with self._changed:
                    if self._closed:  # nobody would note it, so the file must stay
                        return
                    self._save()
                    if piece.state["done"] == "up" and not self._hold:
                        piece.path.unlink(missing_ok=True)
                    self._waiting.popleft()
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _next(self) -> Piece | None:
        """The first that waits; it stays there until it is uploaded."""
        with self._changed:
            while not self._waiting and not self._ending and self._failure is None:
                self._changed.wait()
            return self._waiting[0] if self._waiting and self._failure is None else None

    def _send(self, piece: Piece) -> None:
        for pause in (*PAUSES, None):
            try:
                self._store.upload(piece, self._save, self._stopped)
                return
            except Exception as error:
                final = isinstance(error, PackError) or self._store.is_final(error)
                if final or pause is None or self._stopped.wait(pause):
                    with self._translated():
                        raise

    def _wait(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            while self._waiting and self._failure is None:
                self._changed.wait(0.5)
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn errors of the libraries into one that says what is kept."""
        try:
            yield
        except (PackError, Missing):
            raise
        except Exception as error:  # whatever the libraries raise
            if isinstance(error, OSError) and (error.filename or error.errno in _DISK):
                raise  # of a file here
            found = self._store.explained(error)
            kept = "" if not self._states else (
                " Finished and uploaded files are kept; then run the same command again."
            )  # fmt: skip
            raise PackError(found.message, found.hint + kept) from None


def open_upload(address: Address, card: bool = False) -> Upload:
    """The way to a place.

    Args:
        address: Of the result.
        card: Whether it has a README.md of its own.

    Raises:
        PackError: Its library is not installed.
    """
    if address.scheme == "s3":
        from mergekit_lite.merge.destination_s3 import S3Store

        return Upload(address, S3Store(address.place))
    from mergekit_lite.merge.destination_hub import HubStore

    return Upload(address, HubStore(address.place, card))
