"""Digests of files that are read in pieces, in any order, by several threads."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from mergekit_lite.checkpoint.digest import FileDigest, read_into
from mergekit_lite.errors import FileFormatError


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled", "with gaps", "again", "none"])
@pytest.mark.parametrize("threads", [1, 4])
def test_any_order_gives_the_digest(tmp_path: Path, order: str, threads: int) -> None:
    content = random.Random(1).randbytes(300_007)
    path = tmp_path / "file"
    path.write_bytes(content)
    pieces = [(at, content[at : at + 7001]) for at in range(0, len(content), 7001)]
    if order == "backward":
        pieces.reverse()
    elif order == "shuffled":
        random.Random(2).shuffle(pieces)
    elif order == "with gaps":
        pieces = pieces[::3]
    elif order == "again":
        pieces = pieces + pieces[::2] + [(100, content[100:20_000])]
    elif order == "none":
        pieces = []
    fd = os.open(path, os.O_RDONLY)
    digest = FileDigest(fd, len(content), str(path))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not pieces:
                    return
                at, data = pieces.pop(0)
            digest.feed(at, memoryview(data))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()
    os.close(fd)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(FileFormatError, match="ends at byte 5"):
        read_into(fd, 2, memoryview(bytearray(4)), "file")
    os.close(fd)
