"""The registry of versions: stages, going back, history, and many writers at once."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.errors import PackError
from mergekit_lite.release.registry import Registry, SqliteRegistry, open_registry
from tests.mlflow_server import MlflowServer
from tests.release.test_release import release

__all__ = ["release"]

Pack = Callable[..., Any]
MLFLOW = pytest.mark.xdist_group("mlflow")


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server for all tests of this file."""
    pytest.importorskip("mlflow")
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(params=["file", pytest.param("mlflow", marks=MLFLOW)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A registry's name: a file, or MLflow's server."""
    if request.param == "file":
        return str(tmp_path / "r.sqlite")
    server: MlflowServer = request.getfixturevalue("mlflow")
    return server.address


@pytest.fixture
def registry(place: str, request: pytest.FixtureRequest) -> Iterator[Registry]:
    """A registry with three versions; in MLflow each test has a model of its own."""
    made = _Named(
        open_registry(place, create=True), f"m-{request.node.name}".replace("[", "-").strip("]")
    )
    for version in ("1.0.0", "1.1.0", "2.0.0"):
        assert made.add("m", version, f"digest-{version}", {"bytes": 1}, "card")
    yield made
    made.close()


class _Named:
    """A registry in which ``m`` has another name, so that tests may share a server."""

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry = registry
        self._name = name

    def __getattr__(self, method: str) -> Any:
        called = getattr(self._registry, method)
        if method == "close":
            return called
        return lambda name, *more: called(self._name, *more)


def test_stages(registry: Registry) -> None:
    registry.promote("m", "1.0.0", "production")
    registry.promote("m", "1.1.0", "canary", 0.1)
    registry.promote("m", "1.1.0", "production")
    registry.promote("m", "2.0.0", "production")
    assert registry.current("m")["production"].version == "2.0.0"
    assert registry.rollback("m", "production").version == "1.1.0"
    assert registry.rollback("m", "production").version == "1.0.0"
    with pytest.raises(PackError, match="nothing was in production before"):
        registry.rollback("m", "production")
    registry.promote("m", "2.0.0", "production")
    assert registry.rollback("m", "production").version == "1.0.0"
    assert registry.current("m")["canary"].share == 0.1
    assert registry.promote("m", "1.0.0", "production").reason == "rollback"  # it is there
    assert [e.reason for e in registry.history("m")].count("rollback") == 3
    assert len(registry.history("m")) == 8


def test_what_is_told(registry: Registry) -> None:
    """Versions in their order with what was measured; a model that is not there has none."""
    found = registry.versions("m")
    assert [v.version for v in found] == ["1.0.0", "1.1.0", "2.0.0"]
    assert found[0].digest == "digest-1.0.0"
    assert found[0].metrics == {"bytes": 1}
    assert found[0].added.endswith("Z")
    assert registry.current("m") == {}
    assert registry.history("m") == []


def test_mistakes(registry: Registry, tmp_path: Path) -> None:
    assert not registry.add("m", "1.0.0", "digest-1.0.0", {}, "")
    with pytest.raises(PackError, match="with another digest"):
        registry.add("m", "1.0.0", "other", {}, "")
    with pytest.raises(PackError, match="no stage 'prod'"):
        registry.promote("m", "1.0.0", "prod")
    with pytest.raises(PackError, match=r"3\.0\.0 is not in the registry"):
        registry.promote("m", "3.0.0", "canary")
    with pytest.raises(PackError, match="share"):
        registry.promote("m", "1.0.0", "canary", 1.5)
    (tmp_path / "broken").write_bytes(b"no data base at all, but long enough to be one" * 9)
    with pytest.raises(PackError, match="is no registry"):
        open_registry(str(tmp_path / "broken"))
    with pytest.raises(PackError, match="no registry that pack knows"):
        open_registry("redis://x")


def test_history_is_kept(tmp_path: Path) -> None:
    """Not even by hand is an event removed or changed."""
    registry = SqliteRegistry(tmp_path / "r.sqlite")
    registry.add("m", "1.0.0", "digest", {}, "")
    registry.promote("m", "1.0.0", "canary")
    base = sqlite3.connect(tmp_path / "r.sqlite")
    for statement in ("DELETE FROM events", "UPDATE events SET version = '2.0.0'"):
        with pytest.raises(sqlite3.IntegrityError, match="history is kept"):
            base.execute(statement)


def test_many_writers(tmp_path: Path) -> None:
    """Processes that write at once lose nothing."""
    code = (
        "import sys; from pathlib import Path\n"
        "from mergekit_lite.release.registry import SqliteRegistry\n"
        "r = SqliteRegistry(Path(sys.argv[1]))\n"
        "for i in range(20):\n"
        "    r.add('m', f'{sys.argv[2]}.{i}.0', 'd', {}, '')\n"
        "    r.promote('m', f'{sys.argv[2]}.{i}.0', 'canary', 0.5)\n"
    )
    path = tmp_path / "r.sqlite"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(number)], text=True)
        for number in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    found = SqliteRegistry(path)
    assert len(found.versions("m")) == 80
    assert len(found.history("m")) == 80


def test_the_command(pack: Pack, release: Path, place: str) -> None:
    home = release.parents[3]
    there = ("--registry", place)
    ran = pack("registry", "add", release, *there, cwd=home)
    assert ran.code == 0, ran.err
    assert "mine 1.2.0: added" in ran.out
    words = ("registry", "promote", "mine", "1.2.0", "--to")
    assert pack(*words, "production", *there, cwd=home).code == 0
    assert pack("registry", "current", "mine", *there, cwd=home).out.strip() == "1.2.0"
    ran = pack("registry", "list", "mine", *there, cwd=home)
    assert "production 100%" in ran.out
    found = json.loads(pack("registry", "list", "mine", "--json", *there, cwd=home).out)
    assert found["versions"][0]["stages"] == {"production": 1.0}
    assert found["history"][0]["reason"] == "promote"
    ran = pack("registry", "rollback", "mine", *there, cwd=home)
    assert ran.code == 1
    assert pack("registry", "current", "mine", "--stage", "canary", *there, cwd=home).code == 1
    (release / "NOTICE").write_text("x")
    ran = pack("registry", "add", release, *there, cwd=home)
    assert ran.code == 1
    assert "NOTICE: has" in ran.err


@MLFLOW
def test_what_others_see_in_mlflow(pack: Pack, release: Path, mlflow: MlflowServer) -> None:
    """Aliases, tags and the card, by MLflow's own client; an alias that others moved counts."""
    from mlflow.tracking import MlflowClient

    home = release.parents[3]
    (home / "r.yaml").write_text((home / "r.yaml").read_text().replace("name: mine", "name: seen"))
    there = ("--registry", mlflow.address)
    assert pack("merge", "r.yaml", "-q", cwd=home).code == 0
    for version in ("1.2.0", "1.3.0"):
        assert pack("release", "seen", "--version", version, "-q", cwd=home).code == 0
        folder = home / "dist" / "seen" / "release" / version
        assert pack("registry", "add", folder, *there, cwd=home).code == 0
    assert pack("registry", "promote", "seen", "1.2.0", "--to", "production", *there).code == 0
    client = MlflowClient(mlflow.address.replace("mlflow", "http", 1))
    found = client.get_model_version_by_alias("seen", "production")
    assert found.tags["pack.version"] == "1.2.0"
    assert "A model of **ours**." in found.description
    client.set_registered_model_alias("seen", "production", "2")
    assert pack("registry", "current", "seen", *there).out.strip() == "1.3.0"
    ran = pack("deploy", home / "dist" / "seen" / "release" / "1.2.0", "--to", "vllm", *there,
               cwd=home)  # fmt: skip
    assert ran.code == 0, ran.err
    text = (home / "dist" / "seen" / "deploy" / "1.2.0-vllm" / "CHECKLIST.md").read_text()
    assert "- [x] it is known what to go back to: version 1.3.0" in text


def test_a_server_that_is_not_there(pack: Pack, release: Path) -> None:
    pytest.importorskip("mlflow")
    ran = pack("registry", "add", release, "--registry", "mlflow://127.0.0.1:9")
    assert ran.code == 1
    assert "MLflow at http://127.0.0.1:9" in ran.err
