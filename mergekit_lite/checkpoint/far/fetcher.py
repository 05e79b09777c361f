"""Fetches blocks of files ahead of whoever reads them, over several connections.

What a run reads, and in which order, is known before it begins. So blocks are asked for in that
order, as many as a window of memory holds; whoever waits for one that is not there yet puts it
first. A block is let go when all of its bytes were read. What breaks off is continued where it
broke off, after a pause that grows.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mergekit_lite.checkpoint.far.transport import Broken, Changed, Transport
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import Interrupted, PackError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergekit_lite.checkpoint.far.cache import BlockCache

__all__ = ["BLOCK", "FETCHER", "FIRST", "Block", "Fetcher", "Traffic", "at_once", "cache_folder"]

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 8 << 20
"""Bytes of a request: at 1 Gbit/s and 50 ms, eight of them at a time fill the line."""
WINDOW = 160 << 20
CONNECTIONS = 8
FIRST = 4
"""Attempts to reach a server at all; one that answered is tried for longer."""
_ATTEMPTS = 8
_PAUSE, _LONGEST = 0.2, 10.0


@dataclass
class Traffic:
    """What went over the network in this process.

    Attributes:
        received: Bytes.
        requests: That were sent.
        retried: Of them, those that continue one that broke off.
        cached: Bytes that the local cache had.
        seconds: During which at least one request was under way.
    """

    received: int = 0
    requests: int = 0
    retried: int = 0
    cached: int = 0
    seconds: float = 0.0


class Block:
    """A range of a file.

    Attributes:
        start: Its first byte.
        stop: One past its last.
        left: Bytes of it that nobody has read yet.
        data: Its bytes; None while they are not here.
        gone: Whether nobody will read it any more.
    """

    __slots__ = ("data", "failure", "gone", "key", "left", "pending", "start", "stop", "used")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.left = stop - start
        self.data: Array | None = None
        self.failure: BaseException | None = None
        self.pending = False
        self.gone = False
        self.key: tuple[int, int] = (0, 0)
        self.used = 0.0


class Fetcher:
    """Shares connections and memory among all files that are read from afar.

    Attributes:
        window: Bytes that are fetched before somebody asks for them.
        connections: Requests at a time.
        cache_bytes: Size of the local cache; 0 for none.
        paused: Whether blocks are only noted and not fetched, for a plan.
        stopping: Whether nobody shall wait for a block any more.
        traffic: What was fetched.
    """

    def __init__(self) -> None:
        self.window = WINDOW
        self.connections = CONNECTIONS
        self.cache_bytes = 0
        self.paused = False
        self.stopping = False
        self.traffic = Traffic()
        self._changed = threading.Condition()
        self._queue: list[tuple[tuple[int, int], int, Block, Transport, Callable[..., None]]] = []
        self._number = 0
        self._held = 0
        self._ready: dict[int, Block] = {}
        self._busy = 0
        self._since = 0.0
        self._threads: list[threading.Thread] = []
        self._cache: BlockCache | None = None

    def ask(
        self, block: Block, transport: Transport, arrived: Callable[..., None], key: tuple[int, int]
    ) -> None:
        """Put a block on the list of what will be read.

        Args:
            block: Not asked for yet.
            transport: Of its file.
            arrived: Called with the block when it is there, by the thread that fetched it.
            key: Blocks are fetched from the smallest key on.
        """
        with self._changed:
            if self.paused or block.pending or block.data is not None:
                return
            block.pending, block.key, block.failure, block.gone = True, key, None, False
            self._number += 1
            heapq.heappush(self._queue, (key, self._number, block, transport, arrived))
            self._start()
            self._changed.notify_all()

    def take(
        self,
        block: Block,
        transport: Transport,
        arrived: Callable[..., None],
        start: int,
        out: Array,
    ) -> None:
        """Copy a part of a block, which is waited for.

        Args:
            block: Any.
            transport: Of its file.
            arrived: As for `ask`.
            start: Byte of the file where the part begins, inside the block.
            out: uint8; filled whole.

        Raises:
            PackError: It cannot be had.
            Interrupted: The run is being stopped.
        """
        first = True
        while True:
            with self._changed:
                if block.failure is not None:
                    raise block.failure
                data = block.data
                if data is not None:
                    block.used = time.monotonic()
                elif self.stopping:
                    raise Interrupted("stopped")
                elif block.pending and not first:
                    self._changed.wait(1.0)
                    continue
            if data is not None:
                break
            self.want(block, transport, arrived)
            first = False
        at = start - block.start
        out[:] = data[at : at + len(out)]
        with self._changed:
            block.left -= len(out)
            if block.left <= 0:
                self._drop(block)

    def forget(self, blocks: Iterator[Block]) -> None:
        """Let blocks go that nobody will read any more."""
        with self._changed:
            every = list(blocks)
            for block in every:
                block.gone = True
            gone = {id(block) for block in every}
            for entry in self._queue:
                if id(entry[2]) in gone:
                    entry[2].pending = False
            self._queue = [entry for entry in self._queue if id(entry[2]) not in gone]
            heapq.heapify(self._queue)
            self._changed.notify_all()
            for block in every:
                self._drop(block)

    def stop(self) -> None:
        """Let nobody wait any more, for a run that ends early; until `stopping` is unset."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Let blocks be announced and not fetched, for a plan."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def fetch_now(
        self, transport: Transport, start: int, stop: int, attempts: int = _ATTEMPTS
    ) -> bytes:
        """Bytes of a file, at once and past the window; retried as blocks are.

        Raises:
            PackError: They cannot be had.
        """
        return self._fetch(transport, start, stop, attempts)

    def want(self, block: Block, transport: Transport, arrived: Callable[..., None]) -> None:
        """Put a block first that somebody waits for; nothing where it is here or on its way."""
        with self._changed:
            if block.data is not None or (block.pending and block.key[0] < 0):
                return
            if block.pending:
                for at, entry in enumerate(self._queue):
                    if entry[2] is block:
                        del self._queue[at]
                        heapq.heapify(self._queue)
                        break
                else:
                    return  # it is on its way
            block.pending, block.failure, block.gone = True, None, False
            block.key = (-1, block.start)
            self._number += 1
            heapq.heappush(self._queue, (block.key, self._number, block, transport, arrived))
            self._start()
            self._changed.notify_all()

    def _drop(self, block: Block) -> None:
        if block.data is not None:
            self._held -= block.stop - block.start
            block.data = None
            self._ready.pop(id(block), None)
            self._changed.notify_all()

    def _start(self) -> None:
        while len(self._threads) < self.connections:
            thread = threading.Thread(
                target=self._work, name=f"pack-fetch-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _next(self) -> tuple[Block, Transport, Callable[..., None]]:
        with self._changed:
            while True:
                if self._queue:
                    key, _, block, transport, arrived = self._queue[0]
                    size = block.stop - block.start
                    if key[0] < 0 or self._held + size <= self.window:
                        heapq.heappop(self._queue)
                        self._held += size
                        if self._held > 2 * self.window:
                            self._make_room()
                        return block, transport, arrived
                self._changed.wait()

    def _make_room(self) -> None:
        """Let go of what was not read for longest; it is fetched again when it is wanted."""
        for block in sorted(self._ready.values(), key=lambda block: block.used):
            if self._held <= self.window:
                return
            self._drop(block)

    def _work(self) -> None:
        while True:
            block, transport, arrived = self._next()
            data, failure = None, None
            try:
                data = np.frombuffer(self._fetch(transport, block.start, block.stop), np.uint8)
                arrived(block, data)
            except BaseException as error:
                failure = error
            with self._changed:
                block.pending = False
                block.failure = failure
                if failure is None and not block.gone:
                    block.data = data
                    block.left = block.stop - block.start
                    block.used = time.monotonic()
                    self._ready[id(block)] = block
                else:
                    self._held -= block.stop - block.start
                del data
                self._changed.notify_all()

    def _fetch(
        self, transport: Transport, start: int, stop: int, attempts: int = _ATTEMPTS
    ) -> bytes:
        cache = self._local(transport)
        if cache is not None:
            held = cache.find(transport.identity, start, stop)
            if held is not None:
                with self._changed:
                    self.traffic.cached += len(held)
                return held
        got = b""

        def once() -> None:
            nonlocal got
            try:
                got += transport.fetch(start + len(got), stop)
            except Broken as error:
                got += error.got[: stop - start - len(got)]
                if not got or start + len(got) < min(stop, transport.size):
                    raise

        self._persist(once, transport, attempts)
        with self._changed:
            self.traffic.received += len(got) if transport.host else 0
        if cache is not None:
            cache.keep(transport.identity, start, stop, got)
        return got

    def check(self, transport: Transport) -> None:
        """Look whether a file is still the same.

        Raises:
            PackError: It is not, or the server cannot be asked.
        """
        self._persist(transport.check, transport, _ATTEMPTS)

    def _persist(self, once: Callable[[], None], transport: Transport, attempts: int) -> None:
        """Try something several times, with pauses that grow."""
        why = ""
        for attempt in range(attempts):
            try:
                with self._counted(attempt > 0):
                    once()
                return
            except Changed:
                raise PackError(
                    f"{transport.url}: changed while it was being read",
                    "Wait until whatever writes it is done, then run again.",
                ) from None
            except Broken as error:
                why = str(error)
            if attempt + 1 < attempts:
                pause = min(_LONGEST, _PAUSE * 2**attempt)
                time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (spreads requests)
        raise PackError(
            f"{transport.url}: could not be read, after {attempts} attempts ({why})",
            "Check the address and the network, then run the same command again; finished files "
            "are kept.",
        )

    @contextlib.contextmanager
    def _counted(self, again: bool) -> Iterator[None]:
        with self._changed:
            self.traffic.requests += 1
            self.traffic.retried += again
            if self._busy == 0:
                self._since = time.monotonic()
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                if self._busy == 0:
                    self.traffic.seconds += time.monotonic() - self._since

    def _local(self, transport: Transport) -> BlockCache | None:
        if self.cache_bytes <= 0 or not transport.identity:
            return None
        if self._cache is None or self._cache.limit != self.cache_bytes:
            from mergekit_lite.checkpoint.far.cache import BlockCache

            self._cache = BlockCache(cache_folder() / "blocks", self.cache_bytes)
        return self._cache


def at_once(function: Callable[[T], R], items: Iterable[T], most: int = 16) -> list[R]:
    """What a function gives for each item, several at a time, in order.

    Unlike a pool of `concurrent.futures`, threads that wait for a server hold up nothing when one
    of them fails or the user presses Ctrl-C.
    """
    waiting = list(enumerate(items))
    total = len(waiting)
    waiting.reverse()
    found: dict[int, R] = {}
    failures: dict[int, BaseException] = {}
    changed = threading.Condition()

    def work() -> None:
        while True:
            with changed:
                if not waiting or failures:
                    return
                at, item = waiting.pop()
            try:
                result = function(item)
            except BaseException as error:
                with changed:
                    failures[at] = error
                    changed.notify_all()
            else:
                with changed:
                    found[at] = result
                    changed.notify_all()

    for number in range(min(most, total)):
        threading.Thread(target=work, name=f"pack-open-{number}", daemon=True).start()
    with changed:
        while len(found) < total and not failures:
            changed.wait(0.2)
        if failures:
            raise failures[min(failures)]
    return [found[at] for at in range(total)]


def cache_folder() -> Path:
    """Where pack keeps what it can fetch or compute again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pack"


FETCHER = Fetcher()
"""That of this process."""
