"""A whole recipe: merged, quantized and released, each step only where its inputs changed.

Whether a step is to be done is told by its lock: the recipe, the digests of all inputs, the version
of pack. Digests of files that have not changed since they were read are remembered, so that nothing
is read to find out that nothing is to be done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import mergekit_lite
from exporters.gguf.export import Scheme
from exporters.gguf.mixtures import find_mixture
from exporters.gguf.run import Options as GgufOptions
from exporters.gguf.run import Request, prepare_gguf, run_gguf
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.errors import PackError
from mergekit_lite.merge.lock import LOCK_NAME, lock_inputs, resolved_recipe
from mergekit_lite.merge.model import open_whole
from mergekit_lite.merge.run import Options, Progress, prepare, run_merge
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import Recipe, read_recipe
from mergekit_lite.release.bundle import make_release
from mergekit_lite.release.draft import Asked, Draft, draft_release
from mergekit_lite.release.gather import Made, gather, weighing
from mergekit_lite.release.licences.judge import judge_recipe
from mergekit_lite.release.manifest import MANIFEST, read_manifest
from mergekit_lite.release.version import propose

__all__ = ["Built", "Step", "build"]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: ``merge``, ``gguf q4_k_m``, ``release 1.0.0`` …
        done: Whether it was done, or kept from before.
        seconds: That it took.
        folder: Of the result.
    """

    name: str
    done: bool
    seconds: float
    folder: Path


@dataclass(frozen=True)
class Built:
    """What a build made.

    Attributes:
        steps: In order.
        digest: Of the release; None where the recipe has no version.
        warnings: What a good release would have.
    """

    steps: Sequence[Step]
    digest: str | None
    warnings: Sequence[str]


def build(
    path: Path,
    dist: Path,
    options: Options,
    progress: Progress,
    asked: Asked | None = None,
) -> Built:
    """Do what a recipe asks for, as far as it is not done.

    Args:
        path: The recipe's file.
        dist: Folder of all results.
        options: How to run.
        progress: Told how far it is.
        asked: What the recipe does not say, of the release.

    Raises:
        PackError: Licences conflict, or a step fails; what is finished is kept.
    """
    recipe = read_recipe(path, METHODS, ALIASES)
    if recipe.output != "model":
        raise PackError(
            f"{path}: gives {recipe.output}, not a model", "Run: pack merge, pack adapters."
        )
    schemes = [find_mixture(entry.scheme) for entry in recipe.quantize or []]
    asked = asked or Asked()
    judged = judge_recipe(path, accepted=asked.accepted)
    if judged.verdict.conflicts:
        listed = "".join(f"\n  {c.sentence}" for c in judged.verdict.conflicts)
        raise PackError(f"licences conflict:{listed}", f"See: pack licenses {path}")
    home = dist / str(recipe.name)
    merged = home / "merged"
    steps = [_merge(recipe, path.parent, merged, options, progress)]
    requests = [
        Request(Scheme(mixture), home / f"gguf-{mixture.name}",
                f"{recipe.name}-{mixture.name.upper()}")
        for mixture in schemes
    ]  # fmt: skip
    steps += _quantize(merged, requests, options, progress)
    if recipe.version is None:
        return Built(steps, None, [])
    return _release(recipe, dist, path.parent, steps, asked)


def _lock(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / LOCK_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    files = [(folder / o["path"], o["bytes"]) for o in found.get("outputs", [])]
    whole = all(file.is_file() and file.stat().st_size == size for file, size in files)
    return found if whole and files else {}


def _is_of(lock: Mapping[str, Any], sources: Sequence[Source]) -> bool:
    """Whether a lock is of this version of pack and of these inputs as they are now."""
    if lock.get("tool", {}).get("version") != mergekit_lite.__version__:
        return False
    weights = {source.reference: source.checkpoint.input_files() for source in sources}
    return bool(lock["inputs"] == lock_inputs(sources, weights))


def _merge(recipe: Recipe, home: Path, folder: Path, options: Options, progress: Progress) -> Step:
    began = time.monotonic()
    prepared = prepare(recipe, home, options.shard_bytes)
    lock = _lock(folder)
    now = resolved_recipe(recipe, prepared.plan.method.symmetric)
    same = bool(lock) and weighing(lock.get("recipe", {})) == weighing(json.loads(json.dumps(now)))
    if same and _is_of(lock, list(prepared.inputs.sources.values())):
        prepared.inputs.close()
        return Step("merge", False, time.monotonic() - began, folder)
    force = options.force or bool(lock)
    run_merge(prepared, folder, replace(options, force=force), progress)
    return Step("merge", True, time.monotonic() - began, folder)


def _quantize(
    merged: Path, requests: Sequence[Request], options: Options, progress: Progress
) -> list[Step]:
    """Quantize to all schemes that are not there; the weights are read once."""
    began = time.monotonic()
    if not requests:
        return []
    model = open_whole(merged.name, merged.parent)  # a name that is the same in any folder
    try:
        locks = {request.folder: _lock(request.folder) for request in requests}
        missing = [
            request
            for request in requests
            if not locks[request.folder]
            or locks[request.folder].get("options")
            or not _is_of(locks[request.folder], list(model.sources))
        ]
        if missing:
            force = options.force or any(locks[request.folder] for request in missing)
            run = GgufOptions(options.threads, options.memory, force)
            run_gguf(prepare_gguf(model, missing), run, progress)
    finally:
        model.close()
    seconds = time.monotonic() - began
    return [
        Step(f"gguf {request.scheme.mixture.name}", request in missing,
             seconds if request in missing else 0.0, request.folder)
        for request in requests
    ]  # fmt: skip


def _release(recipe: Recipe, dist: Path, home: Path, steps: list[Step], asked: Asked) -> Built:
    began = time.monotonic()
    stated = json.loads(json.dumps(resolved_recipe(recipe, METHODS[recipe.merge_method].symmetric)))
    made = replace(gather(dist, str(recipe.name)), stated=stated)
    wanted = {step.folder.name for step in steps}
    made = replace(made, artifacts=[a for a in made.artifacts if a.folder.name in wanted])
    folder = dist / made.name / "release" / str(recipe.version)
    name = f"release {recipe.version}"
    if (folder / MANIFEST).is_file():
        _check_same(folder, made, draft_release(made, home, str(recipe.version), asked))
        digest = read_manifest(folder / MANIFEST)[2]
        return Built([*steps, Step(name, False, time.monotonic() - began, folder)], digest, [])
    released = make_release(made, dist, home, asked)
    step = Step(name, True, time.monotonic() - began, released.folder)
    return Built([*steps, step], released.digest, released.warnings)


def _check_same(folder: Path, made: Made, draft: Draft) -> None:
    """The release that is there holds what would be released now.

    Raises:
        PackError: It holds something else.
    """
    held = json.loads((folder / LOCK_NAME).read_text("utf-8")).get("results")
    stated = folder / "recipe.yaml"
    said = yaml.safe_load(stated.read_text("utf-8")) if stated.is_file() else {}
    changed = {
        key for key in said.keys() | draft.recipe.keys() if said.get(key) != draft.recipe.get(key)
    }
    if held == {a.folder.name: a.released_lock for a in made.artifacts} and changed <= {"hub"}:
        return
    proposal = propose(folder.parent, made)
    assert proposal is not None  # noqa: S101 (there is this one at least)
    keys = f" (changed in the recipe: {', '.join(sorted(changed))})" if changed else ""
    raise PackError(
        f"{folder}: version {draft.version} was released with other content{keys}; a version "
        "never changes",
        f"Since {proposal.before} {proposal.why}: write version: {proposal.version} into the "
        "recipe.",
    )
