"""The registry of versions: stages, going back, history, and many writers at once."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.errors import PackError
from mergekit_lite.release.registry import Registry
from tests.release.test_release import release

__all__ = ["release"]

Pack = Callable[..., Any]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "r.sqlite")
    for version in ("1.0.0", "1.1.0", "2.0.0"):
        assert made.add("m", version, f"digest-{version}", {"bytes": 1}, "card")
    return made


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
    assert [e.reason for e in registry.history("m")].count("rollback") == 3
    assert len(registry.history("m")) == 8


def test_mistakes(registry: Registry, tmp_path: Path) -> None:
    assert not registry.add("m", "1.0.0", "digest-1.0.0", {}, "")
    with pytest.raises(PackError, match="with another digest"):
        registry.add("m", "1.0.0", "other", {}, "")
    with pytest.raises(PackError, match="no stage 'prod'"):
        registry.promote("m", "1.0.0", "prod")
    with pytest.raises(PackError, match=r"m 3\.0\.0 is not in the registry"):
        registry.promote("m", "3.0.0", "canary")
    with pytest.raises(PackError, match="share"):
        registry.promote("m", "1.0.0", "canary", 1.5)
    (tmp_path / "broken").write_bytes(b"no data base at all, but long enough to be one" * 9)
    with pytest.raises(PackError, match="is no registry"):
        Registry(tmp_path / "broken")


def test_history_is_kept(registry: Registry, tmp_path: Path) -> None:
    """Not even by hand is an event removed or changed."""
    registry.promote("m", "1.0.0", "canary")
    base = sqlite3.connect(tmp_path / "r.sqlite")
    for statement in ("DELETE FROM events", "UPDATE events SET version = '2.0.0'"):
        with pytest.raises(sqlite3.IntegrityError, match="history is kept"):
            base.execute(statement)


def test_many_writers(tmp_path: Path) -> None:
    """Processes that write at once lose nothing."""
    code = (
        "import sys; from pathlib import Path\n"
        "from mergekit_lite.release.registry import Registry\n"
        "r = Registry(Path(sys.argv[1]))\n"
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
    found = Registry(path)
    assert len(found.versions("m")) == 80
    assert len(found.history("m")) == 80


def test_the_command(pack: Pack, release: Path) -> None:
    home = release.parents[3]
    ran = pack("registry", "add", release, cwd=home)
    assert ran.code == 0, ran.err
    assert "mine 1.2.0: added" in ran.out
    words = ("registry", "promote", "mine", "1.2.0", "--to")
    assert pack(*words, "production", cwd=home).code == 0
    assert pack("registry", "current", "mine", cwd=home).out.strip() == "1.2.0"
    ran = pack("registry", "list", "mine", cwd=home)
    assert "production 100%" in ran.out
    found = json.loads(pack("registry", "list", "mine", "--json", cwd=home).out)
    assert found["versions"][0]["stages"] == {"production": 1.0}
    assert found["history"][0]["reason"] == "promote"
    ran = pack("registry", "rollback", "mine", cwd=home)
    assert ran.code == 1
    assert pack("registry", "current", "mine", "--stage", "canary", cwd=home).code == 1
    (release / "NOTICE").write_text("x")
    ran = pack("registry", "add", release, cwd=home)
    assert ran.code == 1
    assert "NOTICE: has" in ran.err
