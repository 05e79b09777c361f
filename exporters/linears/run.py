"""A model whose linear layers are put on grids: plan, layer by layer, write, lock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.linears.card import quantized_card
from exporters.linears.work import FORMAT, LinearsWork, Request
from mergekit_lite.checkpoint.protocol import TensorSpec
from mergekit_lite.engines.local import LocalEngine
from mergekit_lite.engines.protocol import Computed, Engine
from mergekit_lite.errors import Interrupted
from mergekit_lite.merge.config import index_file, to_json
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.model import WholeModel
from mergekit_lite.merge.plan import Shard
from mergekit_lite.merge.run import DEFAULT_MEMORY, Progress
from mergekit_lite.merge.writer import ArtifactWriter, OutputFile, check_place

__all__ = ["FORMAT", "MadeLinears", "Request", "run_linears"]


@dataclass(frozen=True)
class MadeLinears:
    """One result.

    Attributes:
        folder: Where it lies, or passed through on its way elsewhere.
        outputs: Its files, the lock included.
        bits: Per weight, all tensors together.
        matrices: How many were put on a grid.
        notes: What the user should know.
        seconds: That it took.
        recomputed: Layers and files that were computed again, since whoever did was lost.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    bits: float
    matrices: int
    notes: Sequence[str]
    seconds: float
    recomputed: int = 0


def run_linears(
    model: WholeModel,
    request: Request,
    progress: Progress | None = None,
    engine: Engine | None = None,
    memory: int = DEFAULT_MEMORY,
    upload: Upload | None = None,
) -> MadeLinears:
    """Quantize the linear layers of a model; the result appears when it is whole.

    Args:
        model: Left open.
        request: What is wanted.
        progress: Told how far it is.
        engine: Where it is computed; None for this process.
        memory: Bytes for weights between the passes of tensors that are merged meanwhile.
        upload: Takes the result elsewhere; the folder is then only where it passes through.

    Raises:
        Interrupted: The user stopped it; the same call continues at the layer it was in.
        PackError: The model cannot be run layer by layer, the scheme does not fit, a weight or an
            activation is not finite, the disk is full.
    """
    began = time.monotonic()
    progress = progress or Progress()
    check_place(request.folder, upload, model.sources, request.force)
    work = LinearsWork(model, request)
    writer = ArtifactWriter(
        request.folder, work.shards, work.fingerprints[0], request.force, upload
    )
    try:
        work.store.begin()
        before = set(work.store.done)
        _tell(work, writer, len(before), progress)
        computed = (engine or LocalEngine()).compute(
            work, [writer], request.threads, memory, progress
        )
        notes = _notes(work)
        for line in dict.fromkeys(
            note for index in work.store.done if index not in before
            for note in work.store.notes(index)
        ):  # fmt: skip
            progress.note(line)
        if writer.uploads:
            progress.begin("Upload", 0)
        return _publish(work, writer, computed, notes, began)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"stopped; {len(work.store.done)} of {work.count} layers finished",
            "Run the same command to continue.",
        ) from None
    finally:
        work.store.close()
        writer.close()


def _tell(work: LinearsWork, writer: ArtifactWriter, done: int, progress: Progress) -> None:
    """Say what is known before anything is computed."""
    for line in _planned_notes(work):
        progress.note(line)
    if work.store.discarded or writer.discarded:
        progress.note("the model, the text or the settings changed since the run that was "
                      "stopped; starting afresh")  # fmt: skip
    elif 0 < done < work.count:
        progress.note(f"continuing: {done} of {work.count} layers were done")


def _planned_notes(work: LinearsWork) -> list[str]:
    return [*work.model.notes, *work.found.notes]


def _notes(work: LinearsWork) -> list[str]:
    """What the user should know of the result, each once."""
    told = (note for index in range(work.count) for note in work.store.notes(index))
    return list(dict.fromkeys([*_planned_notes(work), *told]))


def _publish(
    work: LinearsWork,
    writer: ArtifactWriter,
    computed: Computed,
    notes: Sequence[str],
    began: float,
) -> MadeLinears:
    model, request = work.model, work.request
    bits = _bits(work.shards, [model.checkpoint.spec(n) for n in model.checkpoint.names()])
    files = dict(model.files)
    config = {**model.checkpoint.config, "quantization_config": work.written.config}
    files["config.json"] = to_json(config)
    files |= {name: to_json(content) for name, content in work.written.files.items()}
    files["README.md"] = quantized_card(
        model, request.target, request.scheme, str(work.written.config["quant_method"]), bits,
        len(work.matrices), request.details(), notes,
    )  # fmt: skip
    index = index_file(work.shards)
    if index:
        files["model.safetensors.index.json"] = index
    fields: dict[str, Any] = {
        "name": model.name,
        "format": request.target,
        "scheme": request.scheme,
        "asked": request.asked,
        "options": request.options,
        **model.describe(),
        "details": request.details(),
        "computed_with": _versions(request),
        "bits_per_weight": round(bits, 3),
        "notes": notes,
    }
    outputs = writer.outputs(files)
    lock = lock_file("quantize", fields, list(model.sources), computed.weights, outputs)
    published = writer.publish({**files, LOCK_NAME: lock})
    return MadeLinears(
        request.folder,
        published,
        bits,
        len(work.matrices),
        notes,
        time.monotonic() - began,
        computed.recomputed,
    )


def _bits(shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> float:
    stored = sum(e.end - e.start for shard in shards for e in shard.header.entries.values())
    return 8 * stored / max(1, sum(spec.elements for spec in specs))


def _versions(request: Request) -> Mapping[str, Any]:
    """What the bytes follow from; of products of matrices also how many threads share them."""
    import torch
    import transformers

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": request.device.partition(":")[0],
        "dtype": request.dtype,
    }
    if request.windows is not None:
        found["torch_threads"] = request.threads
    return found
