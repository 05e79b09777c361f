"""Measure merges of models that lie elsewhere: `python -m benchmarks.remote`.

A TIES merge of three random models of the 1.1B shape, from this disk and from a server on loopback
with a line of 1 Gbit/s and 50 ms before every answer. README.md beside this file explains it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import measure, peers, report
from benchmarks.paths import REPOSITORY, WORK
from benchmarks.shapes import TINYLLAMA, make_family
from tests.far_server import far_server

_OUT = WORK / "out-remote"
_NAMES = ("base", "tune-1", "tune-2")


def serve(folder: Path, rate: float | None, latency: float, failing: float) -> None:
    """Serve until standard input ends, then print how many bytes and requests that was."""
    with far_server(folder) as far:
        far.rate, far.latency, far.failing = rate, latency, failing
        print(far.url, flush=True)
        sys.stdin.read()
        print(f"{far.sent()} {far.requests}", flush=True)


def recipe(path: Path, where: str) -> Path:
    """Write the merge of the models below an address."""
    models = "".join(
        f"- model: {where}/{name}\n  parameters: {{weight: 0.5, density: 0.5}}\n"
        for name in _NAMES[1:]
    )
    text = f"merge_method: ties\nbase_model: {where}/base\nmodels:\n{models}dtype: bfloat16\n"
    path.write_text(text)
    return path


def one(label: str, where: str) -> list[str]:
    """Run the merge; returns its row but for what the server says."""
    file = recipe(WORK / "remote.yaml", where)
    shutil.rmtree(WORK / "remote-cache", ignore_errors=True)  # nothing is known from before
    command: list[str | Path] = [
        peers.installed_pack(), "merge", file, "-o", _OUT / "model", "--rehash", "-q",
    ]  # fmt: skip
    environment = {"XDG_CACHE_HOME": str(WORK / "remote-cache")}
    run = measure.run(command, _OUT / "model", "remote", environment, hashed=True)
    return [label, f"{run.wall_s:.1f} s", report.gigabytes(run.peak_rss_bytes), run.sha256[:8]]


def remote(label: str, folder: Path, rate: float | None, latency: float, bad: float) -> list[str]:
    """The same from a server that is a process of its own."""
    words = [sys.executable, "-m", "benchmarks.remote", "--serve", str(folder)]
    words += ["--rate", str(rate or 0), "--latency", str(latency), "--failing", str(bad)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as server:  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        where = server.stdout.readline().strip()
        row = one(label, where)
        server.stdin.close()
        sent, requests = map(int, server.stdout.readline().split())
    seconds = float(row[1].split()[0])
    used = f"{sent / seconds / rate:.0%}" if rate else "-"
    return [*row, f"{sent / 1e9:.3f} GB", str(requests), used]


def main() -> None:
    """Measure all and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=125e6, help="bytes a second")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before an answer")
    parser.add_argument("--failing", type=float, default=0.05, help="share of bad answers")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.rate or None, arguments.latency, arguments.failing)
        return
    print(f"\n{measure.machine()}\n")
    folder = make_family(WORK / "tinyllama", TINYLLAMA, "BF16")["base"].parent
    size = sum(f.stat().st_size for n in _NAMES for f in measure.weights(folder / n))
    print(f"three models, {size / 1e9:.3f} GB of files\n", flush=True)
    rows = [[*one("local", str(folder)), "", "", ""]]
    rate, latency = arguments.rate, arguments.latency
    rows.append(remote("no limit", folder, None, 0.0, 0.0))
    rows.append(remote("1 Gbit/s, 50 ms", folder, rate, latency, 0.0))
    rows.append(remote("and 5 % fail", folder, rate, latency, arguments.failing))
    head = ["from", "time", "memory", "sha256", "sent", "requests", "of the line"]
    print(report.table(head, rows))
    shutil.rmtree(_OUT, ignore_errors=True)
    shutil.rmtree(WORK / "remote-cache", ignore_errors=True)


if __name__ == "__main__":
    main()
