"""Results straight to S3 and to the Hub: whole or not at all, continued, nothing overwritten."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran, digests, random_models, write_recipe
from tests.hub_server import Fault, HubServer
from tests.places import (
    DIE_IN_S3,
    SECRET,
    Bucket,
    Files,
    counted,
    hub_environment,
    journal_below,
    killed,
    on_hub,
    watch,
)

for needed in ("s3fs", "boto3", "moto.server"):
    pytest.importorskip(needed)

pytestmark = pytest.mark.xdist_group("s3")

SHAPES = {f"layers.{i}.up.weight": (200, 1000) for i in range(6)}
REPO = "org/mine"
SHARDS = ("--shard-size", "1MB")  # six files

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models(tmp_path_factory.mktemp("models"), shapes=SHAPES)


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:
    return _recipe(models, tmp_path, 0.5)


def _recipe(models: Path, folder: Path, weight: float) -> Path:
    return write_recipe(
        folder / "r.yaml", "linear", {f"{models}/a": {"weight": weight}, f"{models}/b": {}}
    )


@pytest.fixture
def local(pack: Callable[..., Ran], recipe: Path, tmp_path: Path) -> Files:
    """What a folder gets of the same recipe."""
    ran = pack("merge", recipe, "-o", "local", *SHARDS, cwd=tmp_path)
    assert ran.code == 0, ran.err
    return digests(tmp_path / "local")


@pytest.fixture
def run(pack: Callable[..., Ran], recipe: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Merge in this process; no secret is shown, or kept beside the result."""

    def merge(place: object, *words: object) -> Ran:
        ran = pack("merge", recipe, "-o", place, *(words or SHARDS), cwd=tmp_path)
        assert SECRET not in ran.out + ran.err
        for path in (tmp_path / "dist").rglob("*"):
            assert path.is_dir() or SECRET.encode() not in path.read_bytes()
        assert not (tmp_path / "s3:").exists()
        return ran

    return merge


def test_the_same_files_and_nothing_before_the_end(
    bucket: Bucket, run: Callable[..., Ran], local: Files, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Until the first completion nobody sees anything; the lock comes last; few shards lie here."""
    order: list[str] = []
    waiting: list[int] = []

    def see(method: str, words: dict[str, Any]) -> None:
        if method == "upload_part":
            assert bucket.files() == {}
            found = (tmp_path / "dist" / ".uploads").glob(".*.partial/*.safetensors")
            waiting.append(len(list(found)))
        if method in ("complete_multipart_upload", "put_object"):
            order.append(words["Key"].rpartition("/")[2])

    watch(monkeypatch, see)
    ran = run(bucket.place, *SHARDS, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["folder"] == bucket.place
    assert bucket.files() == local
    assert order[-1] == "pack.lock"
    assert len(order) == len(local)
    assert max(waiting) <= 5
    assert bucket.uploads() == []
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("method", "count"),
    [("create_multipart_upload", 2), ("upload_part", 3), ("complete_multipart_upload", 3),
     ("put_object", 3)],
)  # fmt: skip
def test_killed_runs_go_on(
    bucket: Bucket, run: Callable[..., Ran], recipe: Path, local: Files,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, count: int,
) -> None:  # fmt: skip
    """SIGKILL while shards go up, and in the last phase: what was sent is not sent again."""
    words = ("merge", recipe, "-o", bucket.place, *SHARDS)
    killed(DIE_IN_S3.format(method=method, count=count), *words, cwd=tmp_path)
    uploading = method in ("create_multipart_upload", "upload_part")
    assert (bucket.files() == {}) == uploading
    journal = json.loads(journal_below(tmp_path).read_text())
    up = [n for n, state in journal["upload"]["uploads"].items() if state.get("done") == "up"]
    assert len(up) == (count - 1 if uploading else 6)
    counts = counted(monkeypatch)
    ran = run(bucket.place)
    assert ran.code == 0, ran.err
    assert f"continuing: {len(journal['shards'])} of 6" in ran.err
    # The part that had arrived when it was killed is known by the listing of its upload.
    assert counts["upload_part"] == 6 - len(up) - (method == "upload_part")
    assert bucket.files() == local
    assert bucket.uploads() == []


def test_stopped_and_continued(
    bucket: Bucket, run: Callable[..., Ran], recipe: Path, local: Files, tmp_path: Path
) -> None:
    """Ctrl-C while shards go up: one message, and the same command goes on."""
    code = DIE_IN_S3.format(method="upload_part", count=2).replace(
        "die()", "os.kill(os.getpid(), signal.SIGINT)"
    )
    start = (
        f"import os, signal, sys\n{code}\nfrom mergekit_lite.cli import main\n"
        f"sys.argv = ['pack', 'merge', {str(recipe)!r}, '-o', {bucket.place!r}, *{SHARDS!r}]\n"
        "main()"
    )
    ran = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, capture_output=True,
                         text=True, timeout=60)  # fmt: skip
    assert ran.returncode == 130, ran.stderr
    assert "Run the same command to continue." in ran.stderr
    assert "Traceback" not in ran.stderr
    assert bucket.files() == {}
    assert run(bucket.place).code == 0
    assert bucket.files() == local


def test_parts_of_a_shard_are_kept(
    bucket: Bucket, pack: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of three parts, killed after its first."""
    random_models(tmp_path, shapes={f"layers.{i}.up.weight": (2000, 1000) for i in range(2)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    assert pack("merge", recipe, "-o", "local", cwd=tmp_path).code == 0
    code = DIE_IN_S3.format(method="upload_part", count=1) + "\ndestination_s3._AT_ONCE = 1"
    killed(code, "merge", recipe, "-o", bucket.place, cwd=tmp_path)
    counts = counted(monkeypatch)
    ran = pack("merge", recipe, "-o", bucket.place, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert counts["upload_part"] == 1
    assert bucket.files() == digests(tmp_path / "local")


def test_another_recipe_cleans_what_was_sent(
    bucket: Bucket, run: Callable[..., Ran], recipe: Path, models: Path, tmp_path: Path
) -> None:
    words = ("merge", recipe, "-o", bucket.place, *SHARDS)
    killed(DIE_IN_S3.format(method="upload_part", count=3), *words, cwd=tmp_path)
    assert len(bucket.uploads()) >= 3
    _recipe(models, tmp_path, 0.25)
    ran = run(bucket.place)
    assert ran.code == 0, ran.err
    assert "starting afresh" in ran.err
    assert bucket.uploads() == []
    assert len(bucket.files()) == 9


def test_another_recipe_after_the_last_phase_began(
    bucket: Bucket, run: Callable[..., Ran], recipe: Path, models: Path, tmp_path: Path
) -> None:
    """Shards that are visible without a lock are of the killed run; they are replaced."""
    words = ("merge", recipe, "-o", bucket.place, "--shard-size", "800kB")
    killed(DIE_IN_S3.format(method="complete_multipart_upload", count=2), *words, cwd=tmp_path)
    assert len(bucket.files()) == 2
    _recipe(models, tmp_path, 0.25)
    ran = run(bucket.place, "--shard-size", "2GB")
    assert ran.code == 0, ran.err
    assert bucket.uploads() == []
    assert sorted(bucket.files()) == ["config.json", "model.safetensors", "pack.lock"]


def test_what_expired_is_made_again(
    bucket: Bucket, run: Callable[..., Ran], recipe: Path, local: Files, tmp_path: Path
) -> None:
    """A rule of the bucket may abort uploads that wait for long."""
    words = ("merge", recipe, "-o", bucket.place, *SHARDS)
    killed(DIE_IN_S3.format(method="upload_part", count=3), *words, cwd=tmp_path)
    for entry in bucket.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]:
        bucket.client.abort_multipart_upload(
            Bucket=bucket.name, Key=entry["Key"], UploadId=entry["UploadId"]
        )
    ran = run(bucket.place)
    assert ran.code == 0, ran.err
    assert bucket.files() == local


def test_nothing_of_the_users_is_overwritten(
    bucket: Bucket, run: Callable[..., Ran], local: Files, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bucket.put("theirs.txt")
    for words in (SHARDS, (*SHARDS, "--force")):
        ran = run(bucket.place, *words)
        assert ran.code == 1
        assert ("already exists" in ran.err) or ("holds 'theirs.txt'" in ran.err)
    assert list(bucket.files()) == ["theirs.txt"]
    assert not (tmp_path / "dist").exists()
    bucket.client.delete_object(Bucket=bucket.name, Key="models/x/theirs.txt")
    # What comes while shards go up is seen before the end.
    watch(monkeypatch, lambda m, _: bucket.put("late") if m == "create_multipart_upload" else None)
    ran = run(bucket.place)
    assert ran.code == 1
    assert "already exists" in ran.err
    assert list(bucket.files()) == ["late"]
    monkeypatch.undo()


def test_force(bucket: Bucket, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """The former lock goes first, the new one comes last, what is left over goes after it."""
    assert run(bucket.place, "--shard-size", "800kB").code == 0
    before = bucket.files()
    assert "model-00001-of-00006.safetensors" in before
    bucket.client.put_object(Bucket=bucket.name, Key="models/xy/other", Body=b"1")
    assert run(bucket.place, "--shard-size", "2GB").code == 1
    assert bucket.files() == before
    steps: list[str] = []

    def see(method: str, words: dict[str, Any]) -> None:
        if method in ("complete_multipart_upload", "put_object", "delete_object"):
            steps.append(f"{method[:3]} {words['Key'].rpartition('/')[2]}")

    watch(monkeypatch, see)
    ran = run(bucket.place, "--shard-size", "2GB", "--force")
    assert ran.code == 0, ran.err
    assert steps[:4] == [
        "del pack.lock", "com model.safetensors", "put config.json", "put pack.lock"
    ]  # fmt: skip
    assert len(steps) == 4 + 7
    assert sorted(bucket.files()) == ["config.json", "model.safetensors", "pack.lock"]
    assert list(bucket.files("models/xy/")) == ["other"]


def test_errors(
    bucket: Bucket, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each says what to do, without a traceback."""
    ran = run("s3://nobodys-bucket/x")
    assert ran.code == 1
    assert "there is no bucket 'nobodys-bucket'" in ran.err
    for wrong in ("s3://b", "s3://bucket", "s3://bucket/a//b", "s3://bucket/../x", "gs://b/x",
                  "https://a/b", "hf://x", "hf://a/b/c"):  # fmt: skip
        ran = run(wrong)
        assert ran.code in (1, 2)
        assert "Write" in ran.err or "Give" in ran.err
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        ran = run(bucket.place)
        assert ran.code == 1
        assert "no credentials" in ran.err
        assert "AWS_PROFILE" in ran.err
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        ran = run(bucket.place)
        assert ran.code == 1
        assert "S3 cannot be reached" in ran.err
    with monkeypatch.context() as patch:
        found = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda n: None if n == "s3fs" else found(n))
        ran = run(bucket.place)
        assert ran.code == 1
        assert "pip install 'pack-models[s3]'" in ran.err
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("extract", "a", "--base", "base"),
        ("imatrix", "a"),
    ],
)
def test_commands_that_write_here_only(
    pack: Callable[..., Ran], models: Path, words: tuple[str, ...]
) -> None:
    for place in ("s3://bucket/x", "hf://org/x"):
        ran = pack(*words, "-o", place, cwd=models)
        assert ran.code == 2
        assert "this command writes to this machine only" in ran.err
    assert not (models / "s3:").exists()


def test_a_server_that_fails(
    bucket: Bucket, run: Callable[..., Ran], local: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some failures are waited for; with a dead server what is done is kept."""
    left = Counter({"some": 2})

    def fail(method: str, _words: dict[str, Any]) -> None:
        if method == "upload_part" and left["sent"] >= 2 and left["some"]:
            left["some"] -= 1
            raise OSError("gone")
        left["sent"] += method == "upload_part"

    with monkeypatch.context() as patch:
        watch(patch, fail)
        left["some"] = -1
        ran = run(bucket.place)
        assert ran.code == 1
        assert "S3 cannot be reached" in ran.err
        assert "uploaded files are kept" in ran.err
        assert bucket.files() == {}
    with monkeypatch.context() as patch:
        watch(patch, fail)
        left["some"] = 2
        ran = run(bucket.place)
        assert ran.code == 0, ran.err
        assert left["some"] == 0
        assert left["sent"] == 6
    assert bucket.files() == local


def test_local_results_pay_nothing(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mergekit_lite.cli import main\n"
        f"sys.argv = ['pack', 'merge', {str(recipe)!r}, '-o', 'out', '-q']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'s3fs', 'fsspec', 'aiobotocore', 'huggingface_hub',\n"
        "    'mergekit_lite.merge.destination_s3', 'mergekit_lite.merge.destination_hub',\n"
        "} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def to_hub(hub: HubServer, recipe: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Merge in a process that knows this Hub alone."""

    def merge(*words: object) -> Ran:
        ran = subprocess.run(
            [sys.executable, "-m", "mergekit_lite", "merge", recipe, "-o", f"hf://{REPO}",
             *SHARDS, *words],
            cwd=tmp_path, env=hub_environment(hub, tmp_path), capture_output=True, text=True,
        )  # fmt: skip
        assert "hf_xxx" not in ran.stdout + ran.stderr
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    return merge


def _sent(hub: HubServer) -> int:
    return len([path for method, path in hub.requests if (method, path[:5]) == ("PUT", "/lfs/")])


def test_to_the_hub(hub: HubServer, to_hub: Callable[..., Ran], local: Files) -> None:
    """One commit on a private repository; a second time it is refused; --force replaces it."""
    ran = to_hub()
    assert ran.code == 0, ran.err
    assert f"→ hf://{REPO}" in ran.out
    assert on_hub(hub, REPO) == local
    repository = hub.repositories[REPO]
    assert repository.private
    assert len(repository.commits) == 2
    before = repository.refs["main"]
    ran = to_hub()
    assert ran.code == 1
    assert "already exists" in ran.err
    assert repository.refs["main"] == before
    ran = to_hub("--force", "--shard-size", "2GB")
    assert ran.code == 0, ran.err
    assert sorted(on_hub(hub, REPO)) == ["config.json", "model.safetensors", "pack.lock"]
    assert len(repository.commits) == 3


def test_theirs_on_the_hub(hub: HubServer, to_hub: Callable[..., Ran], local: Files) -> None:
    """A card and a licence stay; weights without a lock are refused even with --force."""
    hub.add(REPO, {".gitattributes": b"x", "model.safetensors": b"theirs"})
    ran = to_hub("--force")
    assert ran.code == 1
    assert "holds 'model.safetensors', which pack did not write there" in ran.err
    assert list(on_hub(hub, REPO)) == ["model.safetensors"]
    assert _sent(hub) == 0
    hub.add(REPO, {".gitattributes": b"x", "README.md": b"card"})
    assert to_hub().code == 0
    card = hashlib.sha256(b"card").hexdigest()
    assert on_hub(hub, REPO) == {**local, "README.md": card}


_DIE_AT_HUB = """
from mergekit_lite.merge.destination_hub import HubStore
made, seen = HubStore.{method}, []
def call(self, *words):
    made(self, *words)
    seen.append(1)
    if len(seen) == {count}: die()
HubStore.{method} = call
"""


@pytest.mark.parametrize(("method", "count"), [("upload", 3), ("commit", 1)])
def test_killed_on_the_way_to_the_hub(
    hub: HubServer, to_hub: Callable[..., Ran], recipe: Path, local: Files, tmp_path: Path,
    method: str, count: int,
) -> None:  # fmt: skip
    """Files that are up are not sent again, though they are not here any more; one commit."""
    killed(
        _DIE_AT_HUB.format(method=method, count=count), "merge", recipe, "-o", f"hf://{REPO}",
        *SHARDS, cwd=tmp_path, env=hub_environment(hub, tmp_path),
    )  # fmt: skip
    assert (on_hub(hub, REPO) == {}) == (method == "upload")
    assert _sent(hub) == (3 if method == "upload" else 6)
    ran = to_hub()
    assert ran.code == 0, ran.err
    assert "continuing:" in ran.err
    assert _sent(hub) == 6
    assert on_hub(hub, REPO) == local
    assert len(hub.repositories[REPO].commits) == 2
    assert not (tmp_path / "dist").exists()


def test_the_hub_forgot(
    hub: HubServer, to_hub: Callable[..., Ran], recipe: Path, local: Files, tmp_path: Path
) -> None:
    """Large files that no commit names are removed after a while; then they are made again."""
    killed(
        _DIE_AT_HUB.format(method="upload", count=3), "merge", recipe, "-o", f"hf://{REPO}",
        *SHARDS, cwd=tmp_path, env=hub_environment(hub, tmp_path),
    )  # fmt: skip
    hub.repositories[REPO].large.clear()
    ran = to_hub()
    assert ran.code == 0, ran.err
    assert on_hub(hub, REPO) == local


def test_a_hub_that_fails(hub: HubServer, to_hub: Callable[..., Ran], local: Files) -> None:
    hub.faults.append(Fault("POST .*/commit/", times=1, status=500))
    ran = to_hub()
    assert ran.code == 1
    assert "the Hub answers 500" in ran.err
    assert "Traceback" not in ran.err
    assert on_hub(hub, REPO) == {}
    ran = to_hub()
    assert ran.code == 0, ran.err
    assert _sent(hub) == 6
    assert on_hub(hub, REPO) == local
    hub.faults.append(Fault(f"GET /api/models/{REPO}", status=401))
    ran = to_hub("--force")
    assert ran.code == 1
    assert "hf auth login" in ran.err
