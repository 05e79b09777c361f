"""Places elsewhere that results go to: a bucket of S3 and a Hub, both served on this machine.

A plugin of pytest: its fixtures are there for every test.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer

__all__ = [
    "DIE_IN_S3", "SECRET", "Bucket", "Files", "counted", "hub_environment", "journal_below",
    "killed", "on_hub", "watch",
]  # fmt: skip

SECRET = "not-to-be-seen-anywhere"

Files = dict[str, str]

_NUMBERS = itertools.count()


class Bucket:
    """A bucket of a server on this machine, looked at with another client than pack's."""

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self.name = name

    def files(self, prefix: str = "models/x/") -> Files:
        """Digests by name of what anybody sees below a prefix."""
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", ())
        return {
            entry["Key"].removeprefix(prefix): hashlib.sha256(
                self.client.get_object(Bucket=self.name, Key=entry["Key"])["Body"].read()
            ).hexdigest()
            for entry in listed
        }

    def uploads(self) -> list[str]:
        """Names of what is hidden."""
        listed = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ())
        return sorted(entry["Key"].removeprefix("models/x/") for entry in listed)

    def put(self, name: str) -> None:
        self.client.put_object(Bucket=self.name, Key=f"models/x/{name}", Body=b"theirs")

    @property
    def place(self) -> str:
        return f"s3://{self.name}/models/x"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    import logging

    moto_server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """An empty bucket, for this process and those that it starts."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_server, "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr("mergekit_lite.merge.destination.PAUSES", (0.0, 0.0, 0.0))
    # fsspec keeps what it has opened, another server of this process among it.
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    client = pytest.importorskip("boto3").client("s3", endpoint_url=s3_server)
    name = f"bucket-{next(_NUMBERS)}"
    client.create_bucket(Bucket=name)
    return Bucket(client, name)


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[str, dict[str, Any]], None]) -> None:
    """Show every request to S3, before it is made."""
    from mergekit_lite.merge.destination_s3 import S3Store

    made = S3Store._call

    def call(self: S3Store, method: str, **words: Any) -> dict[str, Any]:
        see(method, words)
        return made(self, method, **words)

    monkeypatch.setattr(S3Store, "_call", call)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests to S3 from here on, by their kind."""
    counts: Counter[str] = Counter()
    watch(monkeypatch, lambda method, _: counts.update([method]))
    return counts


def killed(code: str, *words: object, cwd: Path, env: dict[str, str] | None = None) -> None:
    """Run the command in a process that the code, which may call `die`, ends."""
    start = (
        "import os, signal, sys\n"
        "def die(): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{code}\n"
        "from mergekit_lite.cli import main\n"
        f"sys.argv = ['pack', *{[str(word) for word in words]!r}]\n"
        "main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", start], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == -9, ran.stdout + ran.stderr
    assert SECRET not in ran.stdout + ran.stderr


DIE_IN_S3 = """
from mergekit_lite.merge import destination_s3
made, seen = destination_s3.S3Store._call, []
def call(self, method, **words):
    answer = made(self, method, **words)
    seen.append(method)
    if seen.count({method!r}) == {count}: die()
    return answer
destination_s3.S3Store._call = call
"""


def journal_below(folder: Path) -> Path:
    """The journal of the one result that is on its way elsewhere."""
    return next((folder / "dist" / ".uploads").glob(".*.journal"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def hub_environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Variables of a process that knows this Hub alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**kept, **hub.environment(tmp_path / "hf"), "HF_TOKEN": "hf_" + "x" * 34}


def on_hub(hub: HubServer, repo: str) -> Files:
    """Digests by name of the files of a repository's branch."""
    repository = hub.repositories[repo]
    files = repository.commits[repository.refs["main"]]
    return {n: hashlib.sha256(c).hexdigest() for n, c in files.items() if n != ".gitattributes"}
