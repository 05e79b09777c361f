"""A model that lies elsewhere, as a checkpoint: its headers here, its tensors fetched as read."""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_lite.checkpoint.announce import turn
from mergekit_lite.checkpoint.far.fetcher import BLOCK, FETCHER, FIRST, Block, at_once
from mergekit_lite.checkpoint.far.transport import Transport
from mergekit_lite.checkpoint.header import Header, parse_header, read_length
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.checkpoint.protocol import InputFile
from mergekit_lite.checkpoint.safetensors import (
    INDEX_NAME,
    SafetensorsCheckpoint,
    load_json,
    read_weight_map,
)
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["FarCheckpoint", "FarFile"]

_FINISHING = 8
"""Shards that are finished at a time; each may hold a block."""
_EARLY = 96 << 20
"""Bytes of all files that may wait for their turn to be hashed."""


class FarFile:
    """A file of safetensors on a server.

    Attributes:
        path: Its address, for messages.
        name: Relative to the model.
        size: In bytes.
        header: What it says of its tensors.
        wanted: Bytes of tensors that were announced.

    Raises:
        PackError: It cannot be read, or is no file of safetensors.
    """

    def __init__(self, transport: Transport) -> None:
        self.path = transport.url
        self.name = transport.name
        self._transport = transport
        prefix = FETCHER.fetch_now(transport, 0, 8, FIRST)
        self.size = transport.size
        length = read_length(prefix, self.size, self.path)
        raw = FETCHER.fetch_now(transport, 8, 8 + length, FIRST)
        self.header: Header = parse_header(raw, self.size, self.path)
        self._head = hashlib.sha256(prefix + raw).hexdigest()
        self._known = transport.sha256
        if self._known is None and transport.identity:
            self._known = KNOWN.find_text(transport.identity)
        self._digest = _Digest()
        self._digest.feed(0, prefix + raw)
        self._lock = threading.Lock()
        self._blocks: list[Block] = []
        self._starts: list[int] = []
        self._spans: list[tuple[int, int, int]] = []
        self._soon = 0
        self.wanted = 0

    @property
    def host(self) -> str:
        """What is shared by files that come over one line."""
        return self._transport.host

    def will_need(self, offset: int, count: int) -> None:
        """Take note of bytes that will be read: in their turn, or soon."""
        if count <= 0:
            return
        at = turn(self._plan)
        if at is not None:
            self._spans.append((offset, offset + count, at))
            return
        with self._lock:
            self._soon += 1
            blocks = self._covering(offset, offset + count)
            for number, block in enumerate(blocks):
                self._ask(block, (self._soon, number))

    def _plan(self) -> None:
        """Cut what was announced into blocks: neighbours together, nothing else between them."""
        with self._lock:
            FETCHER.forget(iter(self._blocks))
            spans, self._spans = sorted(self._spans), []
            joined: list[list[tuple[int, int, int]]] = []
            upto = -1
            for span in spans:
                if span[0] <= upto:
                    joined[-1].append(span)
                else:
                    joined.append([span])
                upto = max(upto, span[1])
            self._blocks, keys = [], []
            for group in joined:
                start, stop = group[0][0], max(stop for _, stop, _ in group)
                for at in range(start, stop, BLOCK):
                    block = Block(at, min(at + BLOCK, stop))
                    self._blocks.append(block)
                    keys.append(_key(block, group))
            self._starts = [block.start for block in self._blocks]
            self.wanted = sum(block.stop - block.start for block in self._blocks)
            for block, key in sorted(zip(self._blocks, keys, strict=True), key=lambda x: x[1]):
                self._ask(block, key)

    def _ask(self, block: Block, key: tuple[int, int]) -> None:
        FETCHER.ask(block, self._transport, self._arrived, key)

    def _arrived(self, block: Block, data: Array) -> None:
        self._digest.feed(block.start, data)

    def _covering(self, start: int, stop: int) -> list[Block]:
        """Blocks that hold these bytes; new ones where nothing was announced. Under the lock."""
        found: list[Block] = []
        while start < stop:
            at = bisect.bisect_right(self._starts, start) - 1
            if at >= 0 and start < self._blocks[at].stop:
                block = self._blocks[at]
            else:
                after = self._starts[at + 1] if at + 1 < len(self._starts) else stop
                block = Block(
                    start, min(start + BLOCK, max(stop, start + 1), max(after, start + 1))
                )
                self._blocks.insert(at + 1, block)
                self._starts.insert(at + 1, start)
            found.append(block)
            start = block.stop
        return found

    def read(self, offset: int, out: Array) -> None:
        """Fill a contiguous array from a byte offset, waiting for what is not here yet."""
        view = out.reshape(-1).view("u1")
        stop = offset + len(view)
        with self._lock:
            blocks = self._covering(offset, stop)
        for block in blocks[1:]:  # all of them at once, not one after the other
            FETCHER.want(block, self._transport, self._arrived)
        for block in blocks:
            begin, end = max(offset, block.start), min(stop, block.stop)
            part = view[begin - offset : end - offset]
            FETCHER.take(block, self._transport, self._arrived, begin, part)

    def save(self, path: Path) -> None:
        """Fetch the whole file, unless it is there already.

        Its time of change is made of its state, so that a copy on another machine has the same.

        Args:
            path: In a folder of this state of the file, if the server tells one from another.

        Raises:
            PackError: It cannot be had, or written.
        """
        told = self._transport.identity
        if told and path.is_file() and path.stat().st_size == self.size:
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            with beside.open("wb") as file:
                for start in range(0, self.size, BLOCK):
                    stop = min(start + BLOCK, self.size)
                    file.write(FETCHER.fetch_now(self._transport, start, stop))
            if told:
                at = int(hashlib.sha256(self.fingerprint().encode()).hexdigest()[:7], 16)
                os.utime(beside, (at, at))
            beside.rename(path)
        except OSError as error:
            raise PackError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            beside.unlink(missing_ok=True)

    def fingerprint(self) -> str:
        """Name, size, the server's name for this state, and head in one line."""
        return f"{self.name} {self.size} {self._transport.identity} {self._head}"

    def finish(self) -> InputFile:
        """Hash what has not passed, unless the digest is known; check that it is the same file.

        Raises:
            PackError: It changed, or what came is not what the server has.
        """
        FETCHER.check(self._transport)
        sha256 = self._known
        if sha256 is None or self._digest.upto >= self.size:
            while (start := self._digest.upto) < self.size:
                stop = min(start + BLOCK, self.size)
                self._digest.feed(start, FETCHER.fetch_now(self._transport, start, stop))
            found = self._digest.hexdigest()
            if self._transport.sha256 not in (None, found):
                raise PackError(
                    f"{self.path}: what came is not what the server says that it has "
                    f"(sha256 {found[:12]}…, not {self._transport.sha256[:12]}…)",
                    "Run again; if it stays so, the file is damaged where it lies.",
                )
            sha256 = found
        if self._transport.identity:
            KNOWN.note_text(self._transport.identity, sha256)
        return InputFile(self.name, self.size, sha256)

    def close(self) -> None:
        """Let go of what was fetched."""
        self._digest.close()
        with self._lock:
            FETCHER.forget(iter(self._blocks))


def _key(block: Block, group: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """When the first of a block's tensors is read, and how far into it the block lies."""
    inside = [(at, start) for start, stop, at in group if start < block.stop and stop > block.start]
    at, start = min(inside)
    return at, max(0, block.start - start) // BLOCK


class _Digest:
    """SHA-256 of bytes that come in about their order; what comes early is held for its turn.

    Attributes:
        waiting: Bytes that all digests of this process hold.
        upto: Bytes that are hashed.
    """

    waiting = 0
    _counting = threading.Lock()

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._early: dict[int, Array | bytes] = {}
        self._lock = threading.Lock()
        self.upto = 0

    def feed(self, start: int, data: Array | bytes) -> None:
        """Take bytes of the file."""
        with self._lock:
            if start > self.upto:
                if start not in self._early and self._count(len(data)):
                    self._early[start] = data
                return
            self._take(start, data)
            while self.upto in self._early:
                held = self._early.pop(self.upto)
                self._count(-len(held))
                self._take(self.upto, held)

    def close(self) -> None:
        """Let go of what waits."""
        with self._lock:
            self._count(-sum(len(held) for held in self._early.values()))
            self._early.clear()

    @classmethod
    def _count(cls, more: int) -> bool:
        with cls._counting:
            fits = _Digest.waiting + more <= _EARLY or more <= 0
            _Digest.waiting += more if fits else 0
            return fits

    def _take(self, start: int, data: Array | bytes) -> None:
        if start + len(data) > self.upto:
            self._hash.update(memoryview(data)[self.upto - start :])  # type: ignore[arg-type]
            self.upto = start + len(data)

    def hexdigest(self) -> str:
        """Of all that came."""
        return self._hash.hexdigest()


class FarCheckpoint(SafetensorsCheckpoint):
    """Tensors of files on servers.

    Args:
        label: How the user named it.
        folder: Holds the small files of the model; None for a bare file.
        transports: Of its files of weights.

    Attributes:
        far: The files.
    """

    def __init__(self, label: str, folder: Path | None, transports: Sequence[Transport]) -> None:
        self.label = label
        self.folder = folder
        self.config = {}
        self._files = []
        self._where = {}
        config = folder / "config.json" if folder is not None else None
        if config is not None and config.is_file():
            self.config = load_json(config)
        self.far = at_once(FarFile, transports)
        for file in self.far:
            self._add(file)
        index = folder / INDEX_NAME if folder is not None else None
        if index is not None and index.is_file():
            self._check_index(read_weight_map(index))
        self._names = sorted(self._where)

    def prefetch(self, name: str) -> None:
        """Fetch a whole tensor ahead, or take note of when it will be read."""
        file = self._where[name]
        file.will_need(file.header.entries[name].start, self.spec(name).nbytes)

    def input_files(self) -> list[InputFile]:
        """The shards, hashed; several at a time, since each waits for a server."""
        return at_once(FarFile.finish, self.far, _FINISHING)

    def elsewhere(self) -> Mapping[str, tuple[int, int]]:
        """Bytes that were announced, and bytes of its files, by host."""
        found: dict[str, tuple[int, int]] = {}
        for file in self.far:
            if file.host:
                wanted, size = found.get(file.host, (0, 0))
                found[file.host] = wanted + file.wanted, size + file.size
        return found
