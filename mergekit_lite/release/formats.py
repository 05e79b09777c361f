"""Formats other than GGUF that a recipe asks for, each made where it is not there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from exporters.linears.run import run_linears
from exporters.onnx.schemes import BLOCKS, find_scheme
from exporters.schemes import BUILT_IN
from exporters.targets import (
    Calibration,
    Wanted,
    check_wanted,
    cut_for,
    describe_asked,
    plan_target,
)
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import require_torch, set_threads
from mergekit_lite.evaluate.text import find_text, read_text
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.merge.model import open_whole
from mergekit_lite.recipe.schema import QuantizeEntry
from mergekit_lite.release.steps import Place, Step, is_of, lock_of

__all__ = ["check_entry", "other_steps", "unfit_of"]


def unfit_of(entry: QuantizeEntry) -> list[str]:
    """Keys of an entry that mean nothing for its format."""
    of_onnx = ("block", "symmetric", "graph")
    given = [key for key in of_onnx if getattr(entry, key) is not None]
    if entry.to != "onnx":
        return given
    unfit = [key for key in ("format", "calibrate") if getattr(entry, key) is not None]
    if not entry.scheme.lower().startswith("int4"):
        unfit += [k for k in ("block", "symmetric", "calibration") if getattr(entry, k) is not None]
    return unfit


def check_entry(entry: QuantizeEntry, home: Path, threads: int) -> None:
    """Check what can be checked without the model.

    Raises:
        PackError: There is no such scheme, its text is not there, or a library is missing.
    """
    if entry.to == "onnx":
        from exporters.onnx.session import require_onnxruntime

        find_scheme(entry.scheme)
        _calibration_of(entry, home)
        require_onnxruntime("to: onnx")
    else:
        wanted_of(entry, home, threads)


def other_steps(
    model: Path, entries: Sequence[QuantizeEntry], home: Path, place: Place
) -> list[Step]:
    """Quantize to all formats other than GGUF that are not there, one after the other.

    Args:
        model: Folder of the model.
        entries: What the recipe asks for.
        home: Folder that relative paths of the recipe start from.
        place: Where results go.

    Raises:
        PackError: A text is not there, or the model cannot be quantized so.
    """
    steps = []
    if entries:
        require_torch(f"to: {entries[0].to}")
        set_threads(place.options.threads)
    for entry in entries:
        make = _onnx_step if entry.to == "onnx" else _linear_step
        steps.append(make(model, entry, home, place))
    return steps


def _linear_step(model: Path, entry: QuantizeEntry, home: Path, place: Place) -> Step:
    began = time.monotonic()
    wanted, calibration = wanted_of(entry, home, place.options.threads)
    folder = place.dist / f"{entry.to}-{wanted.scheme}"
    asked = describe_asked(wanted, calibration, *_text_of(calibration))
    whole = open_whole(model.name, model.parent)
    try:
        lock = lock_of(folder)
        same = lock.get("asked") == asked and not lock.get("options")
        done = not (same and is_of(lock, list(whole.sources)))
        if done:
            windows = cut_for(whole, calibration) if wanted.looks else None
            force = place.options.force or (folder / LOCK_NAME).is_file()
            request = plan_target(wanted, whole, windows, folder, force)
            options = place.options
            run_linears(whole, request, place.progress, options.engine, options.memory)
    finally:
        whole.close()
    seconds = time.monotonic() - began if done else 0.0
    return Step(f"{entry.to} {wanted.scheme}", done, seconds, folder)


def _onnx_step(model: Path, entry: QuantizeEntry, home: Path, place: Place) -> Step:
    from exporters.onnx.job import OnnxJob, describe_onnx, run_job

    began = time.monotonic()
    scheme, calibration = find_scheme(entry.scheme), _calibration_of(entry, home)
    folder = place.dist / f"onnx-{scheme.name}"
    job = OnnxJob(
        scheme, folder, calibration, entry.block or BLOCKS[0], entry.symmetric is not False,
        entry.graph or "auto", place.options.threads,
        place.options.force or (folder / LOCK_NAME).is_file(),
    )  # fmt: skip
    text = None if calibration is None else _text_of(calibration)
    whole = open_whole(model.name, model.parent)
    try:
        lock = lock_of(folder)
        done = not (
            lock.get("asked") == describe_onnx(job, text) and is_of(lock, list(whole.sources))
        )
        if done:
            run_job(whole, job, place.progress)
    finally:
        whole.close()
    seconds = time.monotonic() - began if done else 0.0
    return Step(f"onnx {scheme.name}", done, seconds, folder)


def _text_of(calibration: Calibration) -> tuple[str, str]:
    """Name and digest of a text, as locks have them."""
    text = read_text(calibration.path)
    return (BUILT_IN if calibration.path is None else text.name), text.sha256


def wanted_of(entry: QuantizeEntry, home: Path, threads: int) -> tuple[Wanted, Calibration]:
    """What an entry of a recipe asks for.

    Raises:
        PackError: There is no such scheme, or its text is not there.
    """
    calibration = _calibration_of(entry, home) or Calibration()
    wanted = Wanted(
        entry.to, entry.scheme.lower(), entry.format, entry.calibrate is not False, threads=threads
    )
    check_wanted(wanted)
    if entry.calibration is not None and not wanted.looks:
        raise PackError(
            f"{entry.to} {entry.scheme} does not run the model: calibration: has no effect",
            "Leave it out.",
        )
    return wanted, calibration


def _calibration_of(entry: QuantizeEntry, home: Path) -> Calibration | None:
    """Text and settings that an entry states; None where it states none.

    Raises:
        PackError: The text is not there.
    """
    section = entry.calibration
    if section is None:
        return None
    path = None if section.text is None else find_text(section.text, home)
    if section.text is not None and path is None:
        raise PackError(
            f"{section.text}: there is no such text",
            "Correct text: in the recipe's calibration:.",
        )
    return Calibration(path, section.context, section.windows, section.seed)
