"""What was made under a name: the results below dist/NAME, each with its lock."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.known import known_sha256
from mergekit_lite.errors import FileFormatError, PackError, nearest
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.release.hub import hub_plan
from mergekit_lite.release.manifest import Entry

__all__ = [
    "ABOUT",
    "OWN_PAGES",
    "STATED",
    "Artifact",
    "Made",
    "gather",
    "is_intact",
    "last_name",
    "weighing",
]

_BESIDE = frozenset({
    "accept_licenses", "card", "compare", "evaluate", "hub", "license", "licenses", "profile",
    "quantize", "version",
})  # fmt: skip
"""Keys of a recipe that change no weight."""

ABOUT = frozenset({"compare", "evaluate"})
"""Kinds of results that only tell of others."""

STATED = ".recipe.json"
"""Beside the results of a build: its recipe, of which only the papers' part may be newer."""

OWN_PAGES = {"adapters": "ADAPTERS.md", "quantize": "QUANTIZED.md"}
"""What the page of a result is called where the card of the release has its name, by kind."""

_MAIN = ("merge", "adapter", "extract", "adapters")


def weighing(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that its weights follow from."""
    return {key: value for key, value in recipe.items() if key not in _BESIDE}


@dataclass(frozen=True)
class Artifact:
    """One result.

    Attributes:
        folder: Where it lies.
        lock: Contents of its lock.
        files: Its files but the lock, with the digests that were computed as they were written.
    """

    folder: Path
    lock: Mapping[str, Any]
    files: Sequence[Entry]

    @property
    def kind(self) -> str:
        """What made it: ``merge``, ``quantize``, ``adapter`` or another word."""
        return str(self.lock.get("kind"))


@dataclass(frozen=True)
class Made:
    """All results of a name.

    Attributes:
        name: Theirs.
        artifacts: Sorted, the model or adapter itself first.
        stated: The recipe as it stands now; None for that of the locks.
        variant: Format of a release that holds one alone, ``gguf``, ``gptq-w4g128``; empty
            otherwise.
        whole: All that was made, where this is a part of it.
    """

    name: str
    artifacts: Sequence[Artifact]
    stated: Mapping[str, Any] | None = None
    variant: str = ""
    whole: Made | None = None

    @property
    def title(self) -> str:
        """What a release of it is called."""
        return f"{self.name}-{self.variant.upper()}" if self.variant else self.name

    @property
    def model(self) -> Artifact:
        """The model or adapter itself, also of a part."""
        return (self.whole or self).main

    def releases(self, dist: Path) -> Path:
        """Folder of the releases of it, a folder for each version."""
        return dist / self.name / (f"release-{self.variant}" if self.variant else "release")

    def parts(self) -> list[Made]:
        """What is released: all in one, or where the recipe asks the model and each format."""
        plan = hub_plan(self.recipe.get("hub"))
        formats = sorted({_form(a) for a in self.artifacts if a.kind == "quantize"})
        rest = [a for a in self.artifacts if a.kind != "quantize"]
        if not (plan and plan.per_format and formats and rest):
            return [self]
        main = replace(self, artifacts=rest, whole=self)
        return [main, *(
            replace(self, variant=one, whole=self,
                    artifacts=[a for a in self.artifacts
                               if a.kind == "quantize" and _form(a) == one])
            for one in formats
        )]  # fmt: skip

    @property
    def main(self) -> Artifact:
        """The model or adapter itself, or what else there is."""
        return self.artifacts[0]

    def place(self, artifact: Artifact, path: str) -> str:
        """Where a file lies in a release: the model itself at the top, so that programs load it."""
        if self.variant or artifact is self.main:  # its own page gives way to the card
            own = OWN_PAGES.get(artifact.kind, path)
            return own if path == "README.md" else path
        form = _form(artifact) if "format" in artifact.lock else artifact.folder.name
        return f"{form}/{path}"

    def files(self) -> Iterator[tuple[Path, Entry]]:
        """All files but papers: where each is, and as it lies in a release."""
        for artifact in self.artifacts:
            for entry in artifact.files:
                place = self.place(artifact, entry.path)
                yield artifact.folder / entry.path, Entry(place, entry.size, entry.sha256)

    def released_lock(self, artifact: Artifact) -> Mapping[str, Any]:
        """Its lock, less what does not matter for it: papers, and by which path it was reached."""
        lock = {key: value for key, value in artifact.lock.items() if key != "version"}
        if isinstance(lock.get("recipe"), dict):
            lock["recipe"] = weighing(lock["recipe"])
        if artifact is not self.model:
            lock["inputs"] = [
                {**source, "model": self.model.folder.name} if self._is_main(source) else source
                for source in lock.get("inputs", [])
            ]
            if Path(str(lock.get("model", ""))).name == self.model.folder.name:
                lock["model"] = self.model.folder.name
        return lock

    def _is_main(self, source: Mapping[str, Any]) -> bool:
        made = {entry.sha256 for entry in self.model.files}
        return {file["sha256"] for file in source["files"]} <= made

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe that it was made by; empty where there was none."""
        if self.stated is not None:
            return self.stated
        if self.whole is not None:
            return self.whole.recipe
        found = (a.lock.get("recipe") for a in self.artifacts)
        return next((recipe for recipe in found if isinstance(recipe, dict)), {})


def _form(artifact: Artifact) -> str:
    """Format of a quantized result; GGUF files lie together, models of other formats do not."""
    form = str(artifact.lock.get("format"))
    return form if form == "gguf" else f"{form}-{artifact.lock.get('scheme')}"


def is_intact(path: Path, size: int, sha256: str, seal: Path) -> bool:
    """Whether a file is what was written.

    It is read only if it was written to after its seal, and nobody knows its digest since.

    Args:
        path: The file.
        size: In bytes.
        sha256: Of its content.
        seal: The lock or manifest, which was written after it.
    """
    if not path.is_file() or path.stat().st_size != size:
        return False
    if path.stat().st_mtime_ns <= seal.stat().st_mtime_ns:
        return True
    return known_sha256(path) == sha256


def gather(dist: Path, name: str, folders: Collection[str] | None = None) -> Made:
    """Find the results of a name.

    Args:
        dist: Folder of all results.
        name: Of these.
        folders: Names of the folders that count; all if None.

    Raises:
        PackError: There are none, or a file is not what its lock says.
    """
    folder = dist / name
    locks = sorted(
        path for path in _shown(folder.glob(f"*/{LOCK_NAME}"), dist)
        if folders is None or path.parent.name in folders
    )  # fmt: skip
    if not locks:
        every = _shown(dist.glob(f"*/*/{LOCK_NAME}"), dist)
        others = sorted({path.parent.parent.name for path in every})
        raise PackError(
            f"{folder}: nothing was made there{nearest(name, others)}",
            f"Made so far: {', '.join(others)}" if others else "Run pack merge first.",
        )
    found = [_artifact(path) for path in locks]
    _check_apart(found)
    found.sort(key=lambda a: (a.kind not in _MAIN, a.folder.name))
    made = Made(name, found)
    if made.main.kind in _MAIN:
        for artifact in found[1:]:
            _check_fresh(artifact, made.main)
        models = _models(made.main)
        kept = [a for a in found if a.kind != "compare" or _models(a) == models]
        kept = [a for a in kept if a.kind != "evaluate" or _is_of(a, made)]
        made = Made(name, kept)
    later = _later_recipe(folder, made)
    return made if later is None else replace(made, stated=later)


def _check_apart(found: Sequence[Artifact]) -> None:
    """Check that no two results would have one place in a release.

    Raises:
        PackError: Two do.
    """
    places: dict[str, Artifact] = {}
    for artifact in found:
        if artifact.kind != "quantize" or (form := _form(artifact)) == "gguf":
            continue
        other = places.setdefault(form, artifact)
        if other is not artifact:
            raise PackError(
                f"{artifact.folder} and {other.folder} are both {form}",
                "Move one of them away: a release holds one of a kind.",
            )


def _is_of(evaluation: Artifact, made: Made) -> bool:
    """Whether an evaluation is of these results."""
    now = {e.sha256 for a in made.artifacts for e in a.files}
    measured = {str(digest) for digest in (evaluation.lock.get("results") or {}).values()}
    return measured <= now


def _later_recipe(folder: Path, made: Made) -> Mapping[str, Any] | None:
    """The recipe of a later build, where only what it says of papers has changed since."""
    path, lock = folder / STATED, made.main.folder / LOCK_NAME
    try:
        if path.stat().st_mtime_ns < lock.stat().st_mtime_ns:
            return None
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and weighing(found) == weighing(made.recipe)
    return found if same else None


def _check_fresh(artifact: Artifact, main: Artifact) -> None:
    """What was made of the model was made of it as it is now.

    Raises:
        PackError: It was made of an earlier one.
    """
    made = {entry.sha256 for entry in main.files}
    for source in artifact.lock.get("inputs", []):
        weights = {f["sha256"] for f in source["files"] if not f["path"].endswith(".json")}
        of_main = Path(str(source["model"])).name == main.folder.name
        if artifact.kind == "quantize" and of_main and not weights <= made:
            raise PackError(
                f"{artifact.folder}: was made of an earlier {main.folder.name}",
                f"Make it again: pack quantize --force … {main.folder}; or remove it.",
            )


def _models(artifact: Artifact) -> set[str]:
    """Names of all files that went in."""
    return {f["sha256"] for source in artifact.lock.get("inputs", []) for f in source["files"]}


def _artifact(path: Path) -> Artifact:
    try:
        lock = json.loads(path.read_text("utf-8"))
        files = [Entry(o["path"], o["bytes"], o["sha256"]) for o in lock["outputs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path}: is no lock of pack ({type(error).__name__})", "Make this result again."
        ) from None
    for entry in files:
        file = path.parent / entry.path
        if not is_intact(file, entry.size, entry.sha256, path):
            raise PackError(
                f"{file}: is not what its lock says; something changed it",
                "Make this result again: the command that made it, with --force.",
            )
    return Artifact(path.parent, lock, files)


def last_name(dist: Path) -> str:
    """The name under which something was made last.

    Raises:
        PackError: Nothing was made.
    """
    locks = list(_shown(dist.glob(f"*/*/{LOCK_NAME}"), dist))
    if not locks:
        raise PackError(f"{dist}: nothing was made here yet", "Run pack merge first.")
    return max(locks, key=lambda path: (path.stat().st_mtime_ns, path)).parent.parent.name


def _shown(paths: Iterable[Path], dist: Path) -> Iterator[Path]:
    """Those in no hidden folder, where runs that were stopped keep what is no result yet."""
    return (p for p in paths if not any(n[0] == "." for n in p.relative_to(dist).parts))
