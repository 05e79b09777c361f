"""A whole recipe: made, quantized, released, signed and pushed, each step only where it must be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from exporters.gguf.evaluate import require_runner
from exporters.gguf.export import Scheme
from exporters.gguf.mixtures import find_mixture
from exporters.gguf.run import Request
from mergekit_lite.engines.local import LocalEngine
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import require_torch
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.lock import stated_recipe
from mergekit_lite.merge.run import Options, Progress
from mergekit_lite.merge.writer import write_durably
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import Recipe, read_recipe
from mergekit_lite.release.bundle import is_same, make_release
from mergekit_lite.release.draft import Asked, Draft, draft_release
from mergekit_lite.release.evaluated import text_of
from mergekit_lite.release.formats import check_entry, other_steps, unfit_of
from mergekit_lite.release.gather import STATED, gather, is_intact, weighing
from mergekit_lite.release.hub import HubPlan
from mergekit_lite.release.licences.judge import judge_recipe
from mergekit_lite.release.manifest import MANIFEST, SIGNATURE, read_manifest
from mergekit_lite.release.push import push_all
from mergekit_lite.release.sign import key_file, sign_release
from mergekit_lite.release.steps import (
    Place,
    Step,
    compare_step,
    evaluate_step,
    make_step,
    quantize_steps,
)
from mergekit_lite.release.version import propose

__all__ = ["Afterwards", "Built", "build"]


@dataclass(frozen=True)
class Afterwards:
    """What is done with a release.

    Attributes:
        key: What it is signed with: a private key's file, or `sign.KEYLESS`; None if it is not.
        plan: Where on the Hub it is pushed to; None if it is not.
    """

    key: str | None = None
    plan: HubPlan | None = None


@dataclass(frozen=True)
class Built:
    """What a build made.

    Attributes:
        steps: In order.
        digest: Of the release; None where the recipe has no version.
        warnings: What a good release would have.
        releases: Folders of the release, and of those of its formats.
    """

    steps: Sequence[Step]
    digest: str | None
    warnings: Sequence[str]
    releases: Sequence[Path] = ()


def build(
    path: Path,
    dist: Path,
    options: Options,
    progress: Progress,
    asked: Asked | None = None,
    afterwards: Afterwards | None = None,
) -> Built:
    """Do what a recipe asks for, as far as it is not done.

    Args:
        path: The recipe's file.
        dist: Folder of all results.
        options: How to run.
        progress: Told how far it is.
        asked: What the recipe does not say, of the release.
        afterwards: What is done with the release.

    Raises:
        PackError: Licences conflict, or a step fails; what is finished is kept.
    """
    recipe = read_recipe(path, METHODS, ALIASES)
    asked, afterwards = asked or Asked(), afterwards or Afterwards()
    _check(path, recipe, afterwards)
    if not isinstance(options.engine, LocalEngine):
        _check_spread(path, recipe)
    entries = list(recipe.quantize or [])
    schemes = [find_mixture(entry.scheme) for entry in entries if entry.to == "gguf"]
    others = [entry for entry in entries if entry.to != "gguf"]
    for entry in others:
        check_entry(entry, path.parent, options.threads)
    name = str(recipe.name) if recipe.version else None
    judged = judge_recipe(path, name=name, accepted=asked.accepted)
    if judged.verdict.conflicts:
        listed = "".join(f"\n  {c.sentence}" for c in judged.verdict.conflicts)
        raise PackError(f"licences conflict:{listed}", f"See: pack licenses {path}")
    _check_version(recipe, dist)
    place = Place(path.parent, dist / str(recipe.name), options, progress)
    steps = [make_step(recipe, place)]
    requests = [
        Request(Scheme(mixture), place.dist / f"gguf-{mixture.name}",
                f"{recipe.name}-{mixture.name.upper()}")
        for mixture in schemes
    ]  # fmt: skip
    steps += quantize_steps(steps[0].folder, requests, place)
    steps += other_steps(steps[0].folder, others, path.parent, place)
    evaluated = evaluate_step(recipe, place, steps)
    steps += [evaluated] if evaluated else []
    if recipe.version is None:
        return Built(steps, None, [])
    compared = compare_step(recipe, place)
    steps += [compared] if compared else []
    built = _release(recipe, dist, path.parent, steps, asked)
    return _after(built, recipe, afterwards, options.threads, progress)


def _check(path: Path, recipe: Recipe, afterwards: Afterwards) -> None:
    """Say before anything is done what cannot be done.

    Raises:
        PackError: The recipe asks for what does not go together.
    """
    if recipe.quantize and recipe.output != "model":
        raise PackError(
            f"{path}: gives {recipe.output}, which are not quantized",
            "Leave out quantize:, or merge into a model first.",
        )
    seen = set()
    for entry in recipe.quantize or []:
        if (entry.to, entry.scheme.lower()) in seen:
            raise PackError(
                f"{path}: asks for {entry.to} {entry.scheme} twice", "Leave one of them out."
            )
        seen.add((entry.to, entry.scheme.lower()))
        if entry.to == "gguf" and (
            entry.format or entry.calibration or entry.calibrate is not None
        ):
            raise PackError(
                f"{path}: format and calibration are for GPTQ, AWQ and int8, not for GGUF",
                "Leave them out; by hand: pack quantize --to gguf … --calibration FILE",
            )
        unfit = unfit_of(entry)
        if unfit:
            raise PackError(
                f"{path}: {', '.join(unfit)}: not of {entry.to} {entry.scheme}", "Leave it out."
            )
    if recipe.evaluate and recipe.output != "model":
        raise PackError(
            f"{path}: gives {recipe.output}, which are not evaluated by themselves",
            "Leave out evaluate:, or merge into a model first.",
        )
    if recipe.evaluate:
        text_of(recipe.evaluate, path.parent)
        require_torch("evaluate: in the recipe")
        if any(entry.to == "gguf" for entry in recipe.quantize or []):
            require_runner("evaluate: of quantized files")
    if recipe.version is None and (afterwards.key or afterwards.plan):
        raise PackError(
            f"{path}: makes no release that could be signed or pushed", "Give it a version: 1.0.0"
        )
    if afterwards.key is not None:
        key_file(afterwards.key)


def _check_spread(path: Path, recipe: Recipe) -> None:
    """Refuse what only one process can make, where a cluster was asked for.

    Raises:
        PackError: The recipe asks for it.
    """
    if recipe.output != "model":
        raise PackError(
            f"{path}: gives {recipe.output}, which one process makes",
            "Leave --engine out; models and what they are quantized to are spread over a cluster.",
        )
    if any(entry.to == "onnx" for entry in recipe.quantize or []):
        raise PackError(
            f"{path}: asks for onnx, which one process makes",
            "Leave --engine out, or that format; all others are spread over a cluster.",
        )


def _check_version(recipe: Recipe, dist: Path) -> None:
    """Find out before anything is merged that a version was released of another recipe.

    Raises:
        PackError: It was.
    """
    folder = dist / str(recipe.name) / "release" / str(recipe.version)
    stated = folder / "recipe.yaml"
    if recipe.version is None or not stated.is_file():
        return
    said = yaml.safe_load(stated.read_text("utf-8"))
    now, then = weighing(stated_recipe(recipe)), weighing(said)
    changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if changed:
        raise PackError(
            f"{folder}: version {recipe.version} was released of another recipe (changed: "
            f"{', '.join(changed)}); a version never changes",
            "Raise version: in the recipe.",
        )


def _after(
    built: Built, recipe: Recipe, after: Afterwards, threads: int, progress: Progress
) -> Built:
    """Sign and push."""
    folders = built.releases
    steps = list(built.steps)
    began = time.monotonic()
    if after.key is not None:
        key = key_file(after.key)
        done = [sign_release(folder, key) for folder in folders]
        seconds = time.monotonic() - began
        steps.append(Step("sign", any(done), seconds, folders[0] / SIGNATURE))
    began = time.monotonic()
    if after.plan is not None:
        pushed = push_all(folders, after.plan, str(recipe.name), threads, progress)
        where = Path(f"{pushed[0].repo}@{pushed[0].tag}")
        sent = any(one.added for one in pushed)
        steps.append(Step("push", sent, time.monotonic() - began, where))
    return replace(built, steps=steps)


def _release(recipe: Recipe, dist: Path, home: Path, steps: list[Step], asked: Asked) -> Built:
    began = time.monotonic()
    write_durably(dist / str(recipe.name) / STATED, to_json(stated_recipe(recipe)))
    made = gather(dist, str(recipe.name), {step.folder.name for step in steps})
    made = replace(made, stated=stated_recipe(recipe))
    version = str(recipe.version)
    parts = made.parts()
    folders = [part.releases(dist) / version for part in parts]
    name = f"release {version}"
    if all((folder / MANIFEST).is_file() for folder in folders):
        for part, folder in zip(parts, folders, strict=True):
            _check_same(folder, draft_release(part, home, version, asked))
        digest = read_manifest(folders[0] / MANIFEST)[2]
        step = Step(name, False, time.monotonic() - began, folders[0])
        return Built([*steps, step], digest, [], folders)
    released = make_release(made, dist, home, asked)
    step = Step(name, True, time.monotonic() - began, released[0].folder)
    return Built([*steps, step], released[0].digest, released[0].warnings, folders)


def _check_same(folder: Path, draft: Draft) -> None:
    """The release that is there is what would be released now; untouched files are not read.

    Raises:
        PackError: It is something else, or was changed.
    """
    entries = read_manifest(folder / MANIFEST)[1]
    for name, entry in entries.items():
        if not is_intact(folder / name, entry.size, entry.sha256, folder / MANIFEST):
            raise PackError(
                f"{folder / name}: is not what was released; something changed it",
                f"See all of it: pack verify {folder}. Remove the folder to release it again.",
            )
    known = {*entries, MANIFEST, SIGNATURE}
    extra = [p for p in folder.rglob("*") if not p.is_dir()
             and p.relative_to(folder).as_posix() not in known]  # fmt: skip
    if extra:
        raise PackError(
            f"{extra[0]}: does not belong to the release", f"See all of it: pack verify {folder}"
        )
    if is_same(draft, folder):
        return
    proposal = propose(folder.parent, draft.made)
    assert proposal is not None  # noqa: S101 (there is this one at least)
    stated = folder / "recipe.yaml"
    said = yaml.safe_load(stated.read_text("utf-8")) if stated.is_file() else {}
    now = draft.recipe
    keys = sorted(key for key in said.keys() | now.keys() if said.get(key) != now.get(key))
    changed = f" (changed in the recipe: {', '.join(keys)})" if keys else ""
    raise PackError(
        f"{folder}: version {draft.version} was released with other content{changed}; a version "
        "never changes",
        f"Since {proposal.before} {proposal.why}: write version: {proposal.version} into the "
        "recipe.",
    )
