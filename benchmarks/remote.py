"""Measure merges of models that lie elsewhere: `python -m benchmarks.remote`.

A TIES merge of three random models of the 1.1B shape, from this disk, from a server of files on
loopback with a line of 1 Gbit/s and 50 ms before every answer, and from an S3 server behind one.
README.md beside this file explains it.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks import measure, peers, report
from benchmarks.line import slow_line
from benchmarks.paths import REPOSITORY, WORK
from benchmarks.shapes import TINYLLAMA, make_family
from tests.far_server import far_server

_OUT = WORK / "out-remote"
_NAMES = ("base", "tune-1", "tune-2")
_S3_SHARD = "32MB"
_KEYS = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden",
    "AWS_DEFAULT_REGION": "us-east-1",
}  # fmt: skip


def serve(folder: Path, rate: float | None, latency: float, failing: float) -> None:
    """Serve until standard input ends, then print how many bytes and requests that was."""
    with far_server(folder) as far:
        far.rate, far.latency, far.failing = rate, latency, failing
        print(far.url, flush=True)
        sys.stdin.read()
        print(f"{far.sent()} {far.requests}", flush=True)


def serve_s3() -> None:
    """Serve buckets until standard input ends."""
    from moto.server import ThreadedMotoServer

    logging.disable()  # of every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    server.stop()


def recipe(path: Path, where: str) -> Path:
    """Write the merge of the models below an address."""
    models = "".join(
        f"- model: {where}/{name}\n  parameters: {{weight: 0.5, density: 0.5}}\n"
        for name in _NAMES[1:]
    )
    text = f"merge_method: ties\nbase_model: {where}/base\nmodels:\n{models}dtype: bfloat16\n"
    path.write_text(text)
    return path


def one(label: str, where: str, **variables: str) -> list[str]:
    """Run the merge; returns its row but for what the server says."""
    file = recipe(WORK / "remote.yaml", where)
    shutil.rmtree(WORK / "remote-cache", ignore_errors=True)  # nothing is known from before
    command: list[str | Path] = [
        peers.installed_pack(), "merge", file, "-o", _OUT / "model", "--rehash", "-q",
    ]  # fmt: skip
    environment = {"XDG_CACHE_HOME": str(WORK / "remote-cache"), **variables}
    run = measure.run(command, _OUT / "model", "remote", environment, hashed=True)
    return [label, f"{run.wall_s:.1f} s", report.gigabytes(run.peak_rss_bytes), run.sha256[:8]]


def start(words: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a server that prints where it is and ends with its standard input."""
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
    )  # fmt: skip


def remote(label: str, folder: Path, rate: float | None, latency: float, bad: float) -> list[str]:
    """The same from a server that is a process of its own."""
    words = [sys.executable, "-m", "benchmarks.remote", "--serve", str(folder)]
    words += ["--rate", str(rate or 0), "--latency", str(latency), "--failing", str(bad)]
    with start(words) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        where = server.stdout.readline().strip()
        row = one(label, where)
        server.stdin.close()
        sent, requests = map(int, server.stdout.readline().split())
    seconds = float(row[1].split()[0])
    used = f"{sent / seconds / rate:.0%}" if rate else "-"
    return [*row, f"{sent / 1e9:.3f} GB", str(requests), used]


@contextmanager
def moto() -> Iterator[int]:
    """Moto's S3 server as a process of its own; gives its port."""
    words = [sys.executable, "-m", "benchmarks.remote", "--serve-s3"]
    with start(words, TMPDIR=str(WORK)) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.stdin.close()


def in_s3(folder: Path, rate: float, latency: float, other: int | None) -> list[list[str]]:
    """The same from an S3 server, without a limit and behind the line.

    Moto reads an object whole for every part of it, so models lie there in small files.

    Args:
        folder: Of the models.
        rate: Bytes a second of the line.
        latency: Seconds before an answer.
        other: Port of loopback where a server other than moto runs, with the keys of the
            environment; None for moto.
    """
    import boto3

    keys = _KEYS if other is None else {name: os.environ.get(name, _KEYS[name]) for name in _KEYS}
    kind = "moto" if other is None else "S3"
    with moto() if other is None else nullcontext(other) as port:
        client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        client.create_bucket(Bucket="models")
        for name in _NAMES:
            model = folder / name if other is not None else in_small_files(folder / name)
            for path in sorted(model.iterdir()):
                client.upload_file(str(path), "models", f"{name}/{path.name}")
            if other is None:
                shutil.rmtree(model)
        rows = []
        for label, limit, wait in ((kind, None, 0.0), (f"{kind}, the line", rate, latency)):
            with slow_line(port, limit, wait) as line:
                where = f"http://127.0.0.1:{line.port}"
                row = one(label, "s3://models", AWS_ENDPOINT_URL_S3=where, **keys)
                used = f"{line.sent / float(row[1].split()[0]) / limit:.0%}" if limit else "-"
                rows.append([*row, f"{line.sent / 1e9:.3f} GB", str(line.answers), used])
    return rows


def in_small_files(model: Path) -> Path:
    """The same model in files of 32 MB, or of one tensor."""
    out = WORK / "out-remote" / "small" / model.name
    text = f"merge_method: linear\nmodels:\n- model: {model}\n  parameters: {{weight: 1.0}}\n"
    path = WORK / "remote-small.yaml"
    path.write_text(text)
    subprocess.run(
        [peers.installed_pack(), "merge", path, "-o", out, "--shard-size", _S3_SHARD, "-q",
         "--force"],
        check=True,
    )  # fmt: skip
    return out


def main() -> None:
    """Measure all and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve-s3", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--s3", type=int, metavar="PORT", help="of loopback: an S3 server other than moto"
    )
    parser.add_argument("--only-s3", action="store_true", help="leave the server of files out")
    parser.add_argument("--rate", type=float, default=125e6, help="bytes a second")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before an answer")
    parser.add_argument("--failing", type=float, default=0.05, help="share of bad answers")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.rate or None, arguments.latency, arguments.failing)
        return
    if arguments.serve_s3:
        serve_s3()
        return
    print(f"\n{measure.machine()}\n")
    folder = make_family(WORK / "tinyllama", TINYLLAMA, "BF16")["base"].parent
    size = sum(f.stat().st_size for n in _NAMES for f in measure.weights(folder / n))
    print(f"three models, {size / 1e9:.3f} GB of files\n", flush=True)
    rows = [[*one("local", str(folder)), "", "", ""]]
    rate, latency = arguments.rate, arguments.latency
    if not arguments.only_s3:
        rows.append(remote("no limit", folder, None, 0.0, 0.0))
        rows.append(remote("1 Gbit/s, 50 ms", folder, rate, latency, 0.0))
        rows.append(remote("and 5 % fail", folder, rate, latency, arguments.failing))
    rows += in_s3(folder, rate, latency, arguments.s3)
    head = ["from", "time", "memory", "sha256", "sent", "requests", "of the line"]
    print(report.table(head, rows))
    shutil.rmtree(_OUT, ignore_errors=True)
    shutil.rmtree(WORK / "remote-cache", ignore_errors=True)


if __name__ == "__main__":
    main()
