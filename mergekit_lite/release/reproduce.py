"""A release made again, from its own recipe and the inputs that its lock names, and compared."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.checkpoint.hub import pinned
from mergekit_lite.errors import PackError
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.merge.run import Options, Progress
from mergekit_lite.release.build import build
from mergekit_lite.release.manifest import MANIFEST, TEMPLATE, read_manifest
from mergekit_lite.release.verify import require_whole

__all__ = ["Reproduced", "reproduce"]


@dataclass(frozen=True)
class Reproduced:
    """What came out.

    Attributes:
        expected: Digest of the release.
        found: Digest of what was made again.
        differing: Files that differ, are missing, or are extra.
    """

    expected: str
    found: str
    differing: tuple[str, ...]


def reproduce(
    folder: Path,
    options: Options,
    progress: Progress,
    links_into: Path | None = None,
    ignored: frozenset[str] = frozenset(),
) -> Reproduced:
    """Make a release again, in a temporary folder.

    Args:
        folder: Of the release. Models that its recipe names by a path are looked for from the
            current folder.
        options: How to run.
        progress: Told how far it is.
        links_into: See `verify_release`.
        ignored: See `verify_release`.

    Raises:
        PackError: The release is damaged, has no recipe, an input is not what it was, or was made
            in a way that the release does not tell.
    """
    document, entries, expected = read_manifest(folder / MANIFEST)
    require_whole(
        folder, options.threads, links_into=links_into, ignored=ignored,
        hint="Get it again from whoever made it.",
    )  # fmt: skip
    recipe = _recipe(folder)
    with tempfile.TemporaryDirectory(prefix="pack-") as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=True))
        if (folder / TEMPLATE).is_file():
            (path.parent / TEMPLATE).write_bytes((folder / TEMPLATE).read_bytes())
        dist = Path(scratch) / "dist"
        try:
            with pinned(_commits(folder)):
                build(path, dist, options, progress)
        except PackError as error:
            if "no such file or folder" not in error.message:
                raise
            raise PackError(
                error.message, "Run it in the folder that the paths of the recipe start from."
            ) from None
        name = str(recipe["name"])
        variant = str(document["name"]).removeprefix(name).removeprefix("-").lower()
        kind = f"release-{variant}" if variant else "release"
        again = dist / name / kind / str(recipe["version"])
        _check_inputs(_lock(folder), _lock(again))
        _, made, found = read_manifest(again / MANIFEST)
    names = entries.keys() | made.keys()
    differing = sorted(
        name for name in names if name not in entries or name not in made
        or entries[name].sha256 != made[name].sha256
    )  # fmt: skip
    return Reproduced(expected, found, tuple(differing))


def _lock(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / LOCK_NAME).read_text("utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PackError(f"{folder}: has no lock of a release", "Give a release of pack.") from None
    return found if isinstance(found, dict) else {}


def _recipe(folder: Path) -> dict[str, Any]:
    """The recipe.

    Raises:
        PackError: There is none, or it does not tell all.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise PackError(f"{folder}: has no recipe", "Only releases of a merge can be made again.")
    for name, lock in sorted(_lock(folder).items()):
        if lock.get("kind") == "quantize" and lock.get("options"):
            raise PackError(
                f"{folder}: {name} was quantized with {', '.join(sorted(lock['options']))}, which "
                "a recipe does not hold",
                "Make it again by hand, and compare with pack diff.",
            )
    recipe = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(recipe, dict) or not {"name", "version"} <= recipe.keys():
        raise PackError(f"{path}: is no recipe of a release", "Get it again from whoever made it.")
    return recipe


def _commits(folder: Path) -> dict[str, str]:
    """The commits that models on the Hub were taken at, by their references."""
    return {
        source["model"].removeprefix("hf://"): source["revision"]
        for lock in _lock(folder).values()
        for source in lock.get("inputs", [])
        if source.get("revision")
    }


def _check_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Every weight that went in is what it was."""
    for name, lock in before.items():
        then = _weights(lock)
        for model, file, digest in sorted(_weights(now.get(name, {}))):
            if (model, file) in {(m, f) for m, f, _ in then} and (model, file, digest) not in then:
                raise PackError(
                    f"{model}: {file} is not what it was when the release was made",
                    "Get the file that the lock names by its digest.",
                )


def _weights(lock: Mapping[str, Any]) -> set[tuple[str, str, str]]:
    return {
        (source["model"], file["path"], file["sha256"])
        for source in lock.get("inputs", [])
        for file in source["files"]
        if lock.get("kind") == "merge"
    }
