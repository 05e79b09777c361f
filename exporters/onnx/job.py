"""What a user asks for in ONNX, calibrated if there is text."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporters.linears.run import run_linears
from exporters.onnx.run import MadeOnnx, OnnxRequest, run_onnx
from exporters.onnx.schemes import BLOCKS, OnnxScheme, Route
from exporters.targets import Calibration, Wanted, cut_for, plan_target, refuse_gguf
from mergekit_lite.evaluate.text import Windows
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.model import WholeModel, open_whole
from mergekit_lite.merge.run import Progress

__all__ = ["OnnxJob", "describe_onnx", "run_job"]


@dataclass(frozen=True)
class OnnxJob:
    """One result that is wanted.

    Attributes:
        scheme: Kind of file.
        folder: Where it goes.
        calibration: Text that 4 bits are rounded by; None for weights alone.
        block: Weights that share a scale, of 4 bits.
        symmetric: Whether the zero point is the middle of the codes.
        route: Who makes the graph.
        threads: Worker threads.
        force: Whether an existing result is replaced.
        device: torch's, that the model is run on to be calibrated.
        dtype: That it is run in.
        linked: Whether floats stay in the model's files.
        verify: Whether the graph is run beside the model.
        upload: Takes the result elsewhere; the folder is then only where it passes through.
    """

    scheme: OnnxScheme
    folder: Path
    calibration: Calibration | None = None
    block: int = BLOCKS[0]
    symmetric: bool = True
    route: Route = "auto"
    threads: int = 1
    force: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    linked: bool = False
    verify: bool = True
    upload: Upload | None = None


def run_job(model: WholeModel, job: OnnxJob, progress: Progress) -> MadeOnnx:
    """Make it.

    Args:
        model: Left open.
        job: What is wanted.
        progress: Told how far it is.

    Raises:
        Interrupted: The user stopped it; the same call continues.
        PackError: See `exporters.onnx.run.run_onnx` and `exporters.linears.run.run_linears`.
    """
    refuse_gguf(model)
    if job.calibration is None or job.scheme.bits != 4:
        return run_onnx(model, _request(job, None, None, None), progress)
    began = time.monotonic()
    windows = cut_for(model, job.calibration)
    kind = "" if job.symmetric else "-asym"
    wanted = Wanted(
        "gptq", f"w4g{job.block}{kind}", threads=job.threads, device=job.device, dtype=job.dtype
    )
    # Codes lie beside the result until it is whole, so that a stopped run continues.
    scratch = job.folder.parent / f".{job.folder.name}.rounded"
    run_linears(model, plan_target(wanted, model, windows, scratch, True), progress)
    rounded = open_whole(str(scratch.resolve()))
    try:
        made = run_onnx(model, _request(job, windows, wanted, rounded), progress)
    finally:
        rounded.close()
    shutil.rmtree(scratch, ignore_errors=True)
    if job.upload is not None:
        job.upload.clean()
    return replace(made, seconds=time.monotonic() - began)


def _request(
    job: OnnxJob, windows: Windows | None, wanted: Wanted | None, rounded: WholeModel | None
) -> OnnxRequest:
    details: dict[str, Any] = {}
    if windows is not None and wanted is not None:
        details = {"method": "gptq", "damping": wanted.settings.damping,
                   "calibration": windows.describe()}  # fmt: skip
    return OnnxRequest(
        job.scheme, job.folder, describe_onnx(job, _text_of(windows)), job.block, job.symmetric,
        job.route, job.threads, job.force, job.linked, job.verify,
        None if rounded is None else rounded.checkpoint, details, job.upload,
    )  # fmt: skip


def _text_of(windows: Windows | None) -> tuple[str, str] | None:
    return None if windows is None else (windows.text.name, windows.text.sha256)


def describe_onnx(job: OnnxJob, text: tuple[str, str] | None) -> dict[str, Any]:
    """What was asked for, as an entry of a recipe, with the digest of the text.

    Args:
        job: What is wanted.
        text: Name and SHA-256 of the calibration text.
    """
    found: dict[str, Any] = {"to": "onnx", "scheme": job.scheme.name}
    if job.block != BLOCKS[0]:
        found["block"] = job.block
    if not job.symmetric:
        found["symmetric"] = False
    if job.route != "auto":
        found["graph"] = job.route
    if text is not None and job.calibration is not None:
        found["calibration"] = {
            "context": job.calibration.context, "windows": job.calibration.windows,
            "seed": job.calibration.seed, "text": text[0], "sha256": text[1],
        }  # fmt: skip
    return found
