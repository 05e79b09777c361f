"""Two releases side by side: recipe, parents, files, what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.release.manifest import MANIFEST, read_manifest

__all__ = ["compare_releases", "is_release"]


def is_release(folder: Path) -> bool:
    """Whether a folder holds a release."""
    return (folder / MANIFEST).is_file()


def compare_releases(before: Path, after: Path) -> dict[str, list[str]]:
    """What changed, a line each, by what it is of.

    Raises:
        FileFormatError: One of them is no release.
    """
    first, old, _ = read_manifest(before / MANIFEST)
    second, new, _ = read_manifest(after / MANIFEST)
    names = [f"{d['name']} {d['version']}" for d in (first, second)]
    files = []
    for path in sorted(old.keys() | new.keys()):
        if path not in new:
            files.append(f"{path}: gone")
        elif path not in old:
            files.append(f"{path}: new, {new[path].size} bytes")
        elif old[path].sha256 != new[path].sha256:
            files.append(f"{path}: changed, {old[path].size} → {new[path].size} bytes")
    return {
        "releases": names,
        "recipe": list(_changes(_recipe(before), _recipe(after), "")),
        "parents": list(_parents(before, after)),
        "measured": list(_changes(_measured(before), _measured(after), "")),
        "files": files,
    }


def _recipe(folder: Path) -> Any:
    path = folder / "recipe.yaml"
    return yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}


def _results(folder: Path) -> Mapping[str, Any]:
    found: Any = json.loads((folder / LOCK_NAME).read_text("utf-8")).get("results")
    return found if isinstance(found, dict) else {}


def _measured(folder: Path) -> dict[str, Any]:
    found = {}
    for name, lock in _results(folder).items():
        checked = lock.get("verification") or {}
        for key in ("divergence", "top_token_agreement", "largest_relative_error"):
            if checked.get(key) is not None:
                found[f"{name} {key}"] = checked[key]
    return found


def _parents(before: Path, after: Path) -> Iterator[str]:
    old, new = _inputs(before), _inputs(after)
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"{name}: gone"
        elif name not in old:
            yield f"{name}: new"
        else:
            changed = sorted(path for path, digest in new[name].items()
                             if old[name].get(path, digest) != digest)  # fmt: skip
            if changed:
                yield f"{name}: {', '.join(changed)} changed"


def _inputs(folder: Path) -> dict[str, dict[str, str]]:
    return {
        source["model"]: {file["path"]: file["sha256"] for file in source["files"]}
        for lock in _results(folder).values()
        if lock.get("kind") != "quantize"
        for source in lock.get("inputs", [])
    }


def _changes(old: Any, new: Any, where: str) -> Iterator[str]:
    """Differences of nested data, each with its place."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys(), key=str):
            yield from _changes(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _changes(a, b, f"{where}[{number}]")
    elif old != new:
        yield f"{where}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = "-" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
