"""Measure what a release costs beyond its weights: `python -m benchmarks.release`.

Two things. How fast the files of a release are hashed when it is verified, over what hashlib does
on as many cores, measured in the same minute; and how many bytes are read when a release is made of
what was merged, whose digests are known. README.md beside this file explains the columns.
"""

import argparse
import contextlib
import hashlib
import io
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import measure, report
from benchmarks.paths import WORK
from mergekit_lite.checkpoint.digest import sha256_of
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.merge.run import default_threads
from mergekit_lite.release.bundle import make_release
from mergekit_lite.release.draft import Asked
from mergekit_lite.release.gather import gather
from mergekit_lite.release.verify import verify_release

_HOME = WORK / "release"


def _made(count: int, size: int) -> int:
    """Lay out what a merge would have left: files of weights, their lock; returns the bytes."""
    folder = _HOME / "dist" / "model" / "merged"
    shutil.rmtree(_HOME, ignore_errors=True)
    folder.mkdir(parents=True)
    content = np.random.default_rng(0).bytes(size)
    outputs = []
    for number in range(count):
        path = folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        path.write_bytes(number.to_bytes(8, "little") + content[8:])
        outputs.append({"path": path.name, "bytes": size, "sha256": sha256_of(path)})
    (folder / LOCK_NAME).write_bytes(to_json({
        "kind": "adapter", "inputs": [], "outputs": outputs, "tool": {"name": "pack-models"},
    }))  # fmt: skip
    return count * size


def _hashlib(threads: int, size: int) -> float:
    """Bytes per second that hashlib does on as many threads, of memory that is there."""
    data = memoryview(np.random.default_rng(1).bytes(64 << 20))
    rounds = max(1, size // threads // len(data))

    def work() -> None:
        for _ in range(rounds):
            hashlib.sha256(data).digest()

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    return threads * rounds * len(data) / (time.monotonic() - began)


@contextlib.contextmanager
def _reading() -> Iterator[list[int]]:
    """Bytes that this process asks the system for meanwhile."""
    found: list[int] = []
    before = _asked_for()
    yield found
    found.append(_asked_for() - before)


def _asked_for() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.release", description=__doc__)
    parser.add_argument("--files", type=int, default=8, help="files of weights, default 8")
    parser.add_argument("--megabytes", type=int, default=384, help="of each, default 384")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions, default 5")
    arguments = parser.parse_args()
    threads = default_threads()
    total = _made(arguments.files, arguments.megabytes << 20)
    os.chdir(_HOME)
    dist = Path("dist")
    with _reading() as read, contextlib.redirect_stderr(io.StringIO()):
        [release] = make_release(gather(dist, "model"), dist, Path(), Asked("1.0.0"))
    ratios, rates = [], []
    for number in range(arguments.repeat):
        floor = _hashlib(threads, total)
        began = time.monotonic()
        found = verify_release(release.folder, threads)
        rate = total / (time.monotonic() - began)
        assert len(found.problems) <= 2, found.problems  # it has no weights that could be merged
        rates.append(rate)
        ratios.append(rate / floor)
        print(f"run {number + 1}: {rate / 1e9:.2f} GB/s, {ratios[-1]:.0%} of hashlib", flush=True)
    report.write_results(WORK / "results-release.json", {
        "ratio": ratios, "rate": rates, "threads": threads, "bytes": total, "read": read[0],
    })  # fmt: skip
    print(f"\n{measure.machine()}\n")
    print(report.table(
        ["what", "measured"],
        [["hashing a release, of hashlib's rate on all cores", f"{statistics.median(ratios):.0%}"],
         ["its rate", f"{statistics.median(rates) / 1e9:.2f} GB/s on {threads} cores"],
         ["read while it was made", f"{read[0] / 1e6:.2f} MB of {total / 1e9:.1f} GB of weights"]],
    ))  # fmt: skip
    shutil.rmtree(_HOME)


if __name__ == "__main__":
    main()
