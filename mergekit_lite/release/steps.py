"""The steps of a build: each makes one kind of result, unless it is there.

Whether a step is to be done is told by its lock: the recipe, the digests of all inputs, the version
of pack. Digests of files that have not changed since they were read are remembered, so that nothing
is read to find out that nothing is to be done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mergekit_lite
from exporters.gguf.run import Options as GgufOptions
from exporters.gguf.run import Request, prepare_gguf, run_gguf
from mergekit_lite.adapters.locate import open_adapter, open_model
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.evaluate.text import read_text
from mergekit_lite.merge.adapters import run_adapter_merge
from mergekit_lite.merge.lock import LOCK_NAME, lock_inputs, stated_recipe
from mergekit_lite.merge.model import open_whole
from mergekit_lite.merge.run import Options, Progress, prepare, run_merge
from mergekit_lite.recipe import Recipe
from mergekit_lite.release.adapters import adapters_of, bundle_adapters
from mergekit_lite.release.compared import compare_inputs
from mergekit_lite.release.evaluated import check_thresholds, evaluate_results, text_of
from mergekit_lite.release.gather import is_intact, weighing

__all__ = [
    "Place", "Step", "compare_step", "evaluate_step", "make_step", "quantize_steps",

]  # fmt: skip


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
class Place:
    """Where a build works, and how.

    Attributes:
        home: Folder that relative paths of the recipe start from.
        dist: Folder of the results under the recipe's name.
        options: How to run.
        progress: Told how far it is.
    """

    home: Path
    dist: Path
    options: Options
    progress: Progress


def make_step(recipe: Recipe, place: Place) -> Step:
    """Make the model, the adapter, or the bundle of adapters."""
    if recipe.output == "adapter":
        return _adapter(recipe, place)
    if recipe.output == "adapters":
        return _bundle(recipe, place)
    began = time.monotonic()
    folder = place.dist / "merged"
    prepared = prepare(recipe, place.home, place.options.shard_bytes)
    lock = lock_of(folder)
    if _same_recipe(lock, recipe) and is_of(lock, list(prepared.inputs.sources.values())):
        prepared.inputs.close()
        return Step("merge", False, time.monotonic() - began, folder)
    force = place.options.force or (folder / LOCK_NAME).is_file()
    run_merge(prepared, folder, replace(place.options, force=force), place.progress)
    return Step("merge", True, time.monotonic() - began, folder)


def _adapter(recipe: Recipe, place: Place) -> Step:
    def run(folder: Path, force: bool) -> None:
        run_adapter_merge(recipe, place.home, folder, force=force, progress=place.progress)

    names = [e.model for e in recipe.models or [] if e.model != recipe.base_model]
    return _unless_there("merge adapters", recipe, names, recipe.base_model, place, "adapter", run)


def _bundle(recipe: Recipe, place: Place) -> Step:
    base, adapters = adapters_of(recipe)

    def run(folder: Path, force: bool) -> None:
        bundle_adapters(
            base, adapters, place.home, folder, force=force, recipe=stated_recipe(recipe)
        )

    names = [adapter.reference for adapter in adapters]
    return _unless_there("bundle adapters", recipe, names, base, place, "adapters", run)


def _unless_there(
    name: str,
    recipe: Recipe,
    adapters: Sequence[str],
    base: str | None,
    place: Place,
    kind: str,
    run: Callable[[Path, bool], None],
) -> Step:
    began = time.monotonic()
    folder = place.dist / kind
    lock = lock_of(folder)
    if _same_recipe(lock, recipe):
        with _opened(adapters, base, place.home) as sources:
            if is_of(lock, sources, unread=base if kind == "adapters" else None):
                return Step(name, False, time.monotonic() - began, folder)
    run(folder, place.options.force or (folder / LOCK_NAME).is_file())
    return Step(name, True, time.monotonic() - began, folder)


@contextmanager
def _opened(adapters: Sequence[str], base: str | None, home: Path) -> Iterator[list[Source]]:
    sources: list[Source] = []
    try:
        for name in adapters:
            sources.append(open_adapter(name, home))  # noqa: PERF401 (closed on an error)
        if base is not None:
            sources += open_model(base, home).sources
        yield sources
    finally:
        for source in sources:
            source.checkpoint.close()


def compare_step(recipe: Recipe, place: Place) -> Step | None:
    """Compare the models with their base, for the card; None where that means nothing."""
    began = time.monotonic()
    names = [entry.model for entry in recipe.models or []]
    base = recipe.base_model or (names[0] if len(names) > 1 else None)
    others = [name for name in names if name != base]
    if not recipe.compare or recipe.output != "model" or base is None or not others:
        return None
    folder = place.dist / "compared"
    opened: dict[str, Source] = {}
    try:
        every = [open_model(name, place.home, opened) for name in (base, *others)]
        sources = list({part.reference: part for s in every for part in s.sources}.values())
        lock = lock_of(folder)
        if lock.get("models") == [base, *others] and is_of(lock, sources):
            return Step("compare", False, time.monotonic() - began, folder)
        force = place.options.force or (folder / LOCK_NAME).is_file()
        done = compare_inputs(
            every, sources, [base, *others], folder, place.options.threads, force, place.progress
        )
    finally:
        for source in opened.values():
            source.checkpoint.close()
    return Step("compare", True, time.monotonic() - began, folder) if done else None


def evaluate_step(recipe: Recipe, place: Place, made: Sequence[Step]) -> Step | None:
    """Measure the model and its quantized files, for the card; None where nothing is asked."""
    began = time.monotonic()
    section = recipe.evaluate
    if section is None:
        return None
    folder, model = place.dist / "evaluated", made[0].folder
    ggufs = {
        step.folder.name.removeprefix("gguf-"): next(
            iter(sorted(step.folder.glob("*.gguf"))), step.folder
        )
        for step in made[1:]
    }
    locks = [lock_of(step.folder) for step in made]
    text = read_text(text_of(section, place.home))
    fields = {
        "settings": section.model_dump(exclude_none=True),
        "text_sha256": text.sha256,
        "results": {
            f"{step.folder.name}/{o['path']}": o["sha256"]
            for step, lock in zip(made, locks, strict=True) for o in lock.get("outputs", [])
        },
    }  # fmt: skip
    opened: dict[str, Source] = {}
    try:
        whole = open_model(section.reference, place.home, opened) if section.reference else None
        sources = list(whole.sources) if whole else []
        lock = lock_of(folder)
        if lock and all(lock.get(k) == v for k, v in fields.items()) and is_of(lock, sources):
            step = Step("evaluate", False, time.monotonic() - began, folder)
        else:
            force = place.options.force or (folder / LOCK_NAME).is_file()
            evaluate_results(
                section,
                text,
                place.home,
                model,
                ggufs,
                fields,
                sources,
                folder,
                force,
                place.progress,
            )
            step = Step("evaluate", True, time.monotonic() - began, folder)
    finally:
        for source in opened.values():
            source.checkpoint.close()
    check_thresholds(section, lock_of(folder).get("measured") or [])
    return step


def quantize_steps(model: Path, requests: Sequence[Request], place: Place) -> list[Step]:
    """Quantize to all schemes that are not there; the weights are read once."""
    began = time.monotonic()
    if not requests:
        return []
    whole = open_whole(model.name, model.parent)  # a name that is the same in any folder
    try:
        locks = {request.folder: lock_of(request.folder) for request in requests}
        missing = [
            request
            for request in requests
            if not locks[request.folder]
            or locks[request.folder].get("options")
            or not is_of(locks[request.folder], list(whole.sources))
        ]
        if missing:
            force = place.options.force or any(
                (request.folder / LOCK_NAME).is_file() for request in missing
            )
            run = GgufOptions(
                place.options.threads, place.options.memory, force, engine=place.options.engine
            )
            run_gguf(prepare_gguf(whole, missing), run, place.progress)
    finally:
        whole.close()
    seconds = time.monotonic() - began
    return [
        Step(f"gguf {request.scheme.mixture.name}", request in missing,
             seconds if request in missing else 0.0, request.folder)
        for request in requests
    ]  # fmt: skip


def lock_of(folder: Path) -> Mapping[str, Any]:
    """The lock of a result that is whole; empty otherwise."""
    try:
        found = json.loads((folder / LOCK_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    outputs = found.get("outputs", [])
    whole = all(
        is_intact(folder / o["path"], o["bytes"], o["sha256"], folder / LOCK_NAME) for o in outputs
    )
    return found if whole and outputs else {}


def _same_recipe(lock: Mapping[str, Any], recipe: Recipe) -> bool:
    return bool(lock) and weighing(lock.get("recipe") or {}) == weighing(stated_recipe(recipe))


def is_of(lock: Mapping[str, Any], sources: Sequence[Source], unread: str | None = None) -> bool:
    """Whether a lock is of this version of pack and of these inputs as they are now.

    Of the one that is `unread`, no weight went in.
    """
    if lock.get("tool", {}).get("version") != mergekit_lite.__version__:
        return False
    weights = {
        source.reference: () if source.reference == unread else source.checkpoint.input_files()
        for source in sources
    }
    return bool(lock["inputs"] == lock_inputs(sources, weights))
