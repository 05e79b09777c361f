"""Versions of releases: which is the newest, and what the next should be called.

A change of the base or of the architecture asks for a new major version, a change of any file that
was made for a minor one, and a change of papers alone for a patch. The order of versions is that of
Semantic Versioning 2.0.0, section 11.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.errors import PackError
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.release.gather import ABOUT, Made
from mergekit_lite.release.manifest import MANIFEST

__all__ = ["PARTS", "Proposal", "check_version", "is_before", "newest", "propose"]

PARTS = ("major", "minor", "patch")
_VERSION = re.compile(
    r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})"
    r"(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?(?:\+[0-9A-Za-z.-]+)?"
)
_UNIMPORTANT = frozenset({"dtype", "torch_dtype", "transformers_version", "_name_or_path",
                          "use_cache"})  # fmt: skip
"""Keys of a config.json that say nothing of the architecture."""


@dataclass(frozen=True)
class Proposal:
    """What the next version should be.

    Attributes:
        version: The proposed one.
        part: Of `PARTS`, which it raises.
        before: The newest one released.
        why: What changed since.
    """

    version: str
    part: str
    before: str
    why: str


def check_version(version: str) -> str:
    """A version, if it is a semantic one.

    Raises:
        PackError: It is not.
    """
    if not _VERSION.fullmatch(version):
        raise PackError(f"'{version}' is no semantic version", "Write for example 1.2.0.")
    return version


def is_before(first: str, second: str) -> bool:
    """Whether a version is older than another."""
    return _order(first) < _order(second)


def _order(version: str) -> tuple[Any, ...]:
    found = _VERSION.fullmatch(version)
    assert found is not None  # noqa: S101 (versions are checked where they come in)
    major, minor, patch, before = found.groups()
    words = [] if before is None else [
        (0, int(word), "") if word.isdigit() else (1, 0, word) for word in before.split(".")
    ]  # fmt: skip
    return int(major), int(minor), int(patch), before is None, words


def newest(releases: Path) -> str | None:
    """The newest version that was released; None if none was.

    Args:
        releases: Folder of the releases, one in each folder.
    """
    found = [path.parent.name for path in releases.glob(f"*/{MANIFEST}")
             if _VERSION.fullmatch(path.parent.name)]  # fmt: skip
    return max(found, key=_order, default=None)


def propose(releases: Path, made: Made, part: str | None = None) -> Proposal | None:
    """The version after the newest one.

    Args:
        releases: Folder of the releases.
        made: What is to be released.
        part: Of `PARTS`, which to raise; None for what the change asks for.

    Returns:
        None if nothing was released yet.
    """
    before = newest(releases)
    if before is None:
        return None
    asked, why = _change(releases / before, made)
    chosen = part or asked
    found = _VERSION.fullmatch(before)
    assert found is not None  # noqa: S101 (`newest` gives versions only)
    major, minor, patch = (int(number) for number in found.groups()[:3])
    if chosen == "major":
        version = f"{major + 1}.0.0"
    elif chosen == "minor":
        version = f"{major}.{minor + 1}.0"
    else:
        version = f"{major}.{minor}.{patch + (found.group(4) is None)}"
    return Proposal(version, chosen, before, why)


def _change(before: Path, made: Made) -> tuple[str, str]:
    """What changed since a release: the part of the version that it asks for, and in words."""
    locks: Mapping[str, Any] = json.loads((before / LOCK_NAME).read_text("utf-8"))["results"]
    then = _recipe(before)
    if then.get("base_model") != made.recipe.get("base_model"):
        return "major", "another base model"
    base = made.recipe.get("base_model")
    if base and _digests(locks, base) != _digests(
        {a.folder.name: a.lock for a in made.artifacts}, base
    ):
        return "major", "the base model changed"
    if _architecture(before) != _architecture(made.model.folder):
        return "major", "the architecture changed"
    old = {
        (name, o["path"], o["sha256"]) for name, lock in locks.items()
        if lock.get("kind") not in ABOUT for o in lock["outputs"]
    }  # fmt: skip
    new = {
        (a.folder.name, e.path, e.sha256) for a in made.artifacts
        if a.kind not in ABOUT for e in a.files
    }  # fmt: skip
    if old != new:
        changed = sorted({f"{name}/{path}" for name, path, _ in old ^ new})
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return "minor", f"{changed[0]}{more} changed"
    return "patch", "no file that was made changed"


def _recipe(folder: Path) -> Mapping[str, Any]:
    path = folder / "recipe.yaml"
    found: Mapping[str, Any] = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _digests(locks: Mapping[str, Any], model: str) -> set[str]:
    """Digests of a model's files, as locks name them; of a base with adapters the base's."""
    return {
        file["sha256"] for lock in locks.values() for source in lock.get("inputs", [])
        if source["model"] == model for file in source["files"]
    }  # fmt: skip


def _architecture(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {key: value for key, value in found.items() if key not in _UNIMPORTANT}
