"""A model quantized to GGUF from start to end: plan, stream, verify, lock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.gguf.export import Scheme
from exporters.gguf.verify import Verification
from exporters.gguf.work import FORMAT, GgufWork, Planned, Prepared, Request, prepare_gguf
from mergekit_lite.engines.local import LocalEngine
from mergekit_lite.engines.protocol import Computed, Engine
from mergekit_lite.errors import Interrupted
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import ArtifactWriter, OutputFile, check_place

__all__ = ["FORMAT", "Made", "Options", "Prepared", "Request", "prepare_gguf", "run_gguf"]


@dataclass(frozen=True)
class Options:
    """How to run; none of it changes a byte of a file.

    Attributes:
        threads: Worker threads.
        memory: Bytes for weights in memory.
        force: Whether an existing result is replaced.
        verify: Whether results are verified; None for models that are small enough.
        engine: Where they are computed.
        uploads: What takes results elsewhere, by the folder that they pass through.
    """

    threads: int
    memory: int
    force: bool = False
    verify: bool | None = None
    engine: Engine = field(default_factory=LocalEngine)
    uploads: Mapping[Path, Upload] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """One result.

    Attributes:
        folder: Where it lies, or passed through on its way elsewhere.
        outputs: Its files, the lock included.
        bits: Per weight, all tensors together.
        types: Number of tensors by type.
        verification: How it was checked; None where it was not.
        seconds: Wall time.
        recomputed: Files that were computed again, since whoever computed them was lost.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    bits: float
    types: Mapping[str, int]
    verification: Verification | None
    seconds: float
    recomputed: int = 0


def run_gguf(prepared: Prepared, options: Options, progress: Progress | None = None) -> list[Made]:
    """Write all files in one pass over the weights; each result appears when it is whole.

    Args:
        prepared: From `prepare_gguf`; its model is closed here.
        options: How to run.
        progress: Told how far it is.

    Raises:
        Interrupted: The user stopped it; the same call continues it.
        PackError: A weight is NaN, infinite or too large; the disk is full; verifying failed.
    """
    progress = progress or Progress()
    began = time.monotonic()
    model = prepared.model
    with ExitStack() as stack:
        stack.callback(model.close)
        for planned in prepared.files:
            folder = planned.request.folder
            check_place(folder, options.uploads.get(folder), model.sources, options.force)
        work = GgufWork(prepared, options.verify)
        writers = []
        for planned, fingerprint in zip(prepared.files, work.fingerprints, strict=True):
            folder = planned.request.folder
            writer = ArtifactWriter(
                folder, planned.shards, fingerprint, options.force, options.uploads.get(folder),
                hold=work.checked,
            )  # fmt: skip
            stack.callback(writer.close)
            writers.append(writer)
        if any(writer.discarded for writer in writers):
            progress.note("the model or the types changed since the run that was stopped; "
                          "starting afresh")  # fmt: skip
        if finished := sum(len(writer.done) for writer in writers):
            total = sum(len(planned.shards) for planned in prepared.files)
            progress.note(f"continuing: {finished} of {total} output files were finished")
        for line in prepared.notes:
            progress.note(line)
        try:
            computed = options.engine.compute(
                work, writers, options.threads, options.memory, progress
            )
            if any(writer.uploads for writer in writers):
                progress.begin("Upload", 0)
            for writer in writers:  # all are there before any is shown
                writer.finish_upload()
            return _publish(prepared, writers, computed, began)
        except Interrupted:
            raise Interrupted("stopped", "Run the same command to continue.") from None


def _publish(
    prepared: Prepared,
    writers: Sequence[ArtifactWriter],
    computed: Computed,
    began: float,
) -> list[Made]:
    made = []
    verifications: Sequence[Verification | None] = computed.checked or [None] * len(writers)
    for planned, writer, checked in zip(prepared.files, writers, verifications, strict=True):
        request = planned.request
        counts: dict[str, int] = {}
        for kind in planned.kinds.values():
            counts[kind.name] = counts.get(kind.name, 0) + 1
        fields: dict[str, Any] = {
            "name": prepared.model.name,
            "format": "gguf",
            "scheme": request.scheme.mixture.name,
            "options": _options(request.scheme),
            **prepared.model.describe(),
            "bits_per_weight": round(_bits(prepared, planned), 3),
            "types": {name: kind.name for name, kind in planned.kinds.items()},
            "notes": prepared.notes,
            "verification": None if checked is None else checked.describe(),
        }
        outputs = writer.outputs({})
        lock = lock_file(
            "quantize", fields, list(prepared.model.sources), computed.weights, outputs
        )
        published = writer.publish({LOCK_NAME: lock})
        made.append(
            Made(
                request.folder, published, _bits(prepared, planned), dict(sorted(counts.items())),
                checked, time.monotonic() - began, computed.recomputed,
            )
        )  # fmt: skip
    return made


def _options(scheme: Scheme) -> dict[str, Any]:
    """What was asked beside the mixture; empty where nothing was."""
    overrides = scheme.overrides
    asked = {
        "tensor_types": [f"{pattern}={kind.name}" for pattern, kind in overrides.patterns],
        "output_type": overrides.output and overrides.output.name,
        "embedding_type": overrides.embedding and overrides.embedding.name,
        "pure": overrides.pure,
        "split_bytes": scheme.split_bytes,
        "importance": bool(scheme.importance),
    }
    return {key: value for key, value in asked.items() if value}


def _bits(prepared: Prepared, planned: Planned) -> float:
    """Bits per weight of all tensors of a file."""
    elements = sum(prepared.gguf.tensors.spec(name).elements for name in planned.kinds)
    stored = sum(
        entry.end - entry.start for shard in planned.shards for entry in
        shard.header.entries.values()
    )  # fmt: skip
    return 8 * stored / max(1, elements)
