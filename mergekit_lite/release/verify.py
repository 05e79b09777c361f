"""Does a release still say the truth? Every file against the manifest, every paper against files.

Weights are hashed on all cores, a file for each; what does not hold is named, all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.checkpoint.digest import sha256_of
from mergekit_lite.errors import PackError
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.release.gather import OWN_PAGES, weighing
from mergekit_lite.release.manifest import (
    MANIFEST,
    SIGNATURE,
    TEMPLATE,
    Entry,
    read_manifest,
    read_object,
)

__all__ = ["Checked", "require_whole", "verify_release"]

_PAPERS = frozenset({
    LOCK_NAME, TEMPLATE, "LICENSE", "NOTICE", "README.md", "provenance.intoto.json", "recipe.yaml",
    "sbom.cdx.json",
})  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        name: Of the release.
        version: Of the release.
        digest: Of the release.
        files: Number of files that were hashed.
        size: Their bytes.
        problems: What does not hold, a line each.
    """

    name: str
    version: str
    digest: str
    files: int
    size: int
    problems: tuple[str, ...]


def verify_release(
    folder: Path,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
    links_into: Path | None = None,
    ignored: frozenset[str] = frozenset(),
) -> Checked:
    """Check a release.

    Args:
        folder: Where it lies.
        threads: How many files are hashed side by side.
        progress: Told the bytes that were hashed.
        links_into: Folder that files may be links into (a cache); None where none may be a link.
        ignored: Files that may be there beside those of the manifest.

    Raises:
        FileFormatError: It has no manifest, or a hostile one.
    """
    document, entries, digest = read_manifest(folder / MANIFEST)
    problems = list(_files(folder, entries, threads, progress, links_into, ignored))
    lock, recipe = read_object(folder / LOCK_NAME), _yaml(folder / "recipe.yaml")
    bill = read_object(folder / "sbom.cdx.json")
    statement = read_object(folder / "provenance.intoto.json")
    checks: dict[str, Callable[[], Iterator[str]]] = {
        MANIFEST: lambda: _papers(entries, bill),
        LOCK_NAME: lambda: _against_lock(lock, recipe, entries),
        "sbom.cdx.json": lambda: _against_bill(bill, document, entries),
        "provenance.intoto.json": lambda: _against_provenance(statement, lock, recipe, entries),
    }
    for name, check in checks.items():
        try:
            problems += list(check())
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            problems.append(f"{name}: is broken")
    size = sum(entry.size for entry in entries.values())
    return Checked(
        str(document.get("name")), str(document.get("version")), digest, len(entries), size,
        tuple(problems),
    )  # fmt: skip


def require_whole(
    folder: Path,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
    links_into: Path | None = None,
    ignored: frozenset[str] = frozenset(),
    hint: str = "Release it again, as a new version.",
) -> Checked:
    """Check a release before anything is done with it; see `verify_release`.

    Raises:
        PackError: It is not as it was released.
    """
    found = verify_release(folder, threads, progress, links_into, ignored)
    if found.problems:
        listed = "".join(f"\n  {problem}" for problem in found.problems)
        raise PackError(f"{folder}: is not as it was released:{listed}", hint)
    return found


def _files(
    folder: Path,
    entries: Mapping[str, Entry],
    threads: int,
    progress: Callable[[int], None],
    links_into: Path | None,
    ignored: frozenset[str],
) -> Iterator[str]:
    """Missing, changed and extra files."""

    def check(entry: Entry) -> str | None:
        path = folder / entry.path
        within = links_into or folder
        linked = not path.resolve().is_relative_to(within.resolve())
        if linked or (path.is_symlink() and not links_into) or not path.is_file():
            return f"{entry.path}: is missing"
        size = path.stat().st_size
        if size != entry.size:
            return f"{entry.path}: has {size} bytes, the manifest says {entry.size}"
        found = sha256_of(path)
        progress(size)
        return None if found == entry.sha256 else f"{entry.path}: its content was changed"

    with ThreadPoolExecutor(threads) as pool:
        largest_first = sorted(entries.values(), key=lambda e: (-e.size, e.path))
        found = dict(zip((e.path for e in largest_first), pool.map(check, largest_first),
                         strict=True))  # fmt: skip
    yield from (problem for path in sorted(found) if (problem := found[path]))
    known = {*entries, MANIFEST, SIGNATURE, *ignored}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and path.is_dir():
            yield f"{name}: is a link to a folder"
        elif not path.is_dir() and name not in known:
            yield f"{name}: is not in the manifest"


def _yaml(path: Path) -> Mapping[str, Any] | None:
    """A recipe; None where there is none."""
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_paper(path: str) -> bool:
    return path in _PAPERS or path.startswith("licenses/")


def _papers(entries: Mapping[str, Entry], bill: Mapping[str, Any]) -> Iterator[str]:
    """What every release has, this one has too."""
    for name in ("README.md", "NOTICE", LOCK_NAME, "sbom.cdx.json", "provenance.intoto.json"):
        if name not in entries:
            yield f"{name}: is not in the manifest, and belongs to every release"
    if bill.get("metadata", {}).get("component", {}).get("licenses") and "LICENSE" not in entries:
        yield "LICENSE: is not in the manifest, and the release states a licence"


def _against_lock(
    lock: Mapping[str, Any], recipe: Mapping[str, Any] | None, entries: Mapping[str, Entry]
) -> Iterator[str]:
    """What the locks say came out is what lies in the release, under its name, and nothing else."""
    results = lock.get("results")
    if not isinstance(results, dict) or not results:
        yield f"{LOCK_NAME}: names no results"
        return
    left = {path: entry.sha256 for path, entry in entries.items() if not _is_paper(path)}
    for name, result in sorted(results.items()):
        for output in result.get("outputs", []):
            path, digest = str(output["path"]), output["sha256"]
            names = {path, *(OWN_PAGES.values() if path == "README.md" else ())}
            places = [p for p in left if p in names or p.endswith(f"/{path}")]
            place = next((p for p in places if left[p] == digest), None)
            if place is None:
                yield f"{LOCK_NAME}: '{path}' of {name} is no file of this release"
            else:
                del left[place]
        stated = result.get("recipe")
        if recipe and stated and weighing(stated) != weighing(recipe):
            yield f"recipe.yaml: is another recipe than {name} was made by"
    for path in left:
        yield f"{path}: is nothing that was made, by {LOCK_NAME}"


def _against_bill(
    bill: Mapping[str, Any], document: Mapping[str, Any], entries: Mapping[str, Entry]
) -> Iterator[str]:
    """The bill lists weights with the manifest's digests, under the release's name and version."""
    if not bill:
        yield "sbom.cdx.json: is missing or broken"
        return
    model = bill.get("metadata", {}).get("component", {})
    for key in ("name", "version"):
        if model.get(key) != document.get(key):
            yield f"sbom.cdx.json: is of {key} {model.get(key)!r}, not {document.get(key)!r}"
    listed = {str(component.get("name")) for component in bill.get("components", [])}
    for path in sorted(p for p in entries if not _is_paper(p) and p not in listed):
        yield f"sbom.cdx.json: does not list '{path}'"
    for component in bill.get("components", []):
        entry = entries.get(str(component.get("name")))
        hashes = {h.get("content") for h in component.get("hashes", [])}
        if entry is None or entry.sha256 not in hashes:
            yield f"sbom.cdx.json: '{component.get('name')}' differs from the manifest"


def _against_provenance(
    statement: Mapping[str, Any],
    lock: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    entries: Mapping[str, Entry],
) -> Iterator[str]:
    """The statement speaks of these files, and of the inputs that the locks name."""
    name = "provenance.intoto.json"
    if not statement:
        yield f"{name}: is missing or broken"
        return
    listed = {str(subject.get("name")) for subject in statement.get("subject", [])}
    for path in sorted(p for p in entries if not _is_paper(p) and p not in listed):
        yield f"{name}: does not speak of '{path}'"
    for subject in statement.get("subject", []):
        entry = entries.get(str(subject.get("name")))
        if entry is None or subject.get("digest", {}).get("sha256") != entry.sha256:
            yield f"{name}: '{subject.get('name')}' differs from the manifest"
    results = lock.get("results")
    inputs = {
        file.get("sha256")
        for result in (results.values() if isinstance(results, dict) else ())
        for source in result.get("inputs", [])
        for file in source.get("files", [])
    }
    definition = statement.get("predicate", {}).get("buildDefinition", {})
    stated = {d.get("digest", {}).get("sha256") for d in definition.get("resolvedDependencies", [])}
    asked = definition.get("externalParameters", {}).get("recipe")
    if recipe is not None and asked != recipe:
        yield f"{name}: names another recipe than recipe.yaml"
    if stated != inputs:
        yield f"{name}: names other inputs than {LOCK_NAME}"
