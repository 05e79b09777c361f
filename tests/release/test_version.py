"""Versions: their order, and which comes next."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_lite.errors import PackError
from mergekit_lite.release.version import check_version, is_before, newest
from tests.release.test_release import CARD, _models, _recipe

Pack = Callable[..., Any]


def test_the_order() -> None:
    """The example of Semantic Versioning 2.0.0, section 11.4, and numbers that grow."""
    order = [
        "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
        "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.2", "1.0.10", "1.2.0", "1.10.0", "2.0.0",
    ]  # fmt: skip
    assert all(is_before(a, b) and not is_before(b, a) for a, b in pairwise(order))
    for wrong in ("1.0", "v1.0.0", "1.0.0-", "01.0.0", "1.0.0-a..b", "", "1.0.0\n"):
        with pytest.raises(PackError, match="no semantic version"):
            check_version(wrong)


def test_what_comes_next(pack: Pack, tmp_path: Path) -> None:
    """By what changed: papers alone, weights, the base."""
    home = _models(tmp_path / "home")
    releases = home / "dist" / "mine" / "release"

    def merge(**keys: object) -> None:
        ran = pack("merge", _recipe(home, **keys), "-q", "--force", cwd=home)
        assert ran.code == 0, ran.err

    def bump(part: str) -> tuple[str | None, str]:
        ran = pack("release", "mine", "--bump", part, cwd=home)
        assert ran.code == 0, ran.err
        return newest(releases), ran.err

    merge()
    ran = pack("release", "mine", "--bump", "auto", cwd=home)
    assert ran.code == 2
    assert "give the first version" in ran.err
    assert pack("release", "mine", "-q", cwd=home).code == 0
    ran = pack("release", "mine", cwd=home)
    assert "--bump patch makes it 1.2.1" in ran.err
    merge(card={**CARD, "summary": "Another."})
    found, said = bump("auto")
    assert found == "1.2.1"
    assert "1.2.0 → 1.2.1: no file that was made changed" in said
    assert yaml.safe_load((releases / "1.2.1" / "recipe.yaml").read_text())["version"] == "1.2.1"
    merge(parameters={"lambda": 0.5})
    assert bump("auto")[0] == "1.3.0"
    assert bump("major")[0] == "2.0.0"
    config = json.loads((home / "base" / "config.json").read_text())
    for name in ("base", "a", "b"):
        (home / name / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    merge()
    found, said = bump("auto")
    assert found == "3.0.0"
    assert "base model changed" in said
    merge(base_model="a", models=[{"model": "b"}])
    found, said = bump("auto")
    assert found == "4.0.0"
    assert "another base model" in said
    assert bump("patch")[0] == "4.0.1"
    ran = pack("release", "mine", "--bump", "patch", "--version", "9.0.0", cwd=home)
    assert ran.code == 2
