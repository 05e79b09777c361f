"""Files written by many threads, in any order, whole and rightly hashed."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from mergekit_lite.checkpoint.protocol import Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.errors import PackError
from mergekit_lite.merge import segments
from mergekit_lite.merge.segments import SegmentedFile
from mergekit_lite.merge.stream import Job, run_jobs


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_000, 65536 * 7, 65536 * 40 + 13])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, direct: bool, threads: int
) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 65536)
    monkeypatch.setattr(segments, "WINDOW", 4)
    monkeypatch.setattr(segments, "_DIRECT", segments._DIRECT if direct else 0)
    content = np.frombuffer(random.Random(size).randbytes(size), np.uint8)
    file = SegmentedFile(tmp_path / "f", size)
    pieces = [(at, content[at : at + 7777]) for at in range(0, size, 7777)]
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not pieces:
                    return
                at, data = pieces.pop(0)
            file.write(at, data)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert file.finish() == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "f").read_bytes() == content.tobytes()


def test_out_of_order_within_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 4096)
    monkeypatch.setattr(segments, "WINDOW", 10)  # the one thread must never wait for itself
    content = np.arange(10 * 4096, dtype=np.uint32).view(np.uint8)[: 10 * 4096]
    file = SegmentedFile(tmp_path / "f", content.size)
    for at in random.Random(0).sample(range(0, content.size, 1024), content.size // 1024):
        file.write(at, content[at : at + 1024])
    assert file.finish() == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "f").read_bytes() == content.tobytes()


def test_a_failure_reaches_every_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for the window is woken by the error of the one that writes."""
    monkeypatch.setattr(segments, "SEGMENT", 4096)
    monkeypatch.setattr(segments, "WINDOW", 2)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    file = SegmentedFile(tmp_path / "f", 40 * 4096)
    errors: list[OSError] = []

    def work() -> None:
        try:
            file.write(0, np.zeros(40 * 4096, np.uint8))
        except OSError as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(60)
    assert [e.errno for e in errors] == [errno.ENOSPC]
    with pytest.raises(OSError, match="No space left"):
        file.finish()
    file.close()


def test_closing_an_unfinished_file(tmp_path: Path) -> None:
    file = SegmentedFile(tmp_path / "f", 10**9)
    file.write(0, np.zeros(100, np.uint8))
    file.close()
    file.close()


class _Waits(Job):
    """The first job: fails once the other thread waits for it to write."""

    def __init__(self, reader: TensorReader, file: SegmentedFile, go: threading.Event) -> None:
        super().__init__(reader)
        self._file = file
        self._go = go

    def finish(self, rows: Rows) -> None:
        assert self._go.wait(60)
        raise PackError("broken")

    def done(self) -> None:
        raise AssertionError


class _RunsAhead(_Waits):
    """The second job: writes far ahead of what the first one owes."""

    def finish(self, rows: Rows) -> None:
        self._go.set()
        self._file.write(4096, np.zeros(30 * 4096, np.uint8))


class _One(TensorReader):
    spec = TensorSpec((1,), DTYPES["F32"])

    def read(self, rows: Rows, out: Array) -> None:
        raise AssertionError


def test_an_error_frees_a_thread_that_ran_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 4096)
    monkeypatch.setattr(segments, "WINDOW", 2)
    file = SegmentedFile(tmp_path / "f", 40 * 4096)
    go = threading.Event()
    jobs: list[Job] = [_Waits(_One(), file, go), _RunsAhead(_One(), file, go)]
    caught: list[BaseException] = []

    def run() -> None:
        try:
            run_jobs(iter(jobs), 2, 1, lambda _: None, file.abort)
        except PackError as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert [str(error) for error in caught] == ["broken"]
    file.close()
