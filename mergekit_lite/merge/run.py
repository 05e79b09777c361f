"""A merge from start to end: plan, compute, lock, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.engines.local import LocalEngine
from mergekit_lite.engines.protocol import Computed, Engine
from mergekit_lite.errors import Interrupted, PackError
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.lock import LOCK_NAME, make_lock
from mergekit_lite.merge.prepare import DEFAULT_SHARD, Prepared, prepare
from mergekit_lite.merge.work import FIXED, MergeWork, observing, peak_memory
from mergekit_lite.merge.writer import ArtifactWriter, OutputFile, check_place

__all__ = [
    "Options", "Prepared", "Progress", "Result", "observing", "peak_memory", "prepare", "run_merge",
]  # fmt: skip

DEFAULT_MEMORY = 512 * 10**6


@dataclass(frozen=True)
class Options:
    """How to run; none of it changes a byte of the result but ``shard_bytes``.

    Attributes:
        threads: Worker threads.
        memory: Bytes for weights in memory.
        shard_bytes: Most bytes of an output file.
        force: Whether an existing result is replaced.
        engine: Where it is computed.
    """

    threads: int
    memory: int = DEFAULT_MEMORY
    shard_bytes: int = DEFAULT_SHARD
    force: bool = False
    engine: Engine = field(default_factory=LocalEngine)


class Progress:
    """What a run tells while it goes on; the command line shows it, everyone else ignores it."""

    def begin(self, title: str, total: int) -> None:
        """A stage of so many bytes begins."""

    def advance(self, count: int) -> None:
        """Bytes are done; called by any thread."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Result:
    """What a merge made.

    Attributes:
        location: Where it lies: a folder, or the address that it was uploaded to.
        outputs: Its files, the lock included.
        seconds: Wall time.
        resumed: Shards that an earlier run had finished.
        nonfinite: Number of NaN and infinite elements, by tensor that has some.
        recomputed: Files that were computed again, since whoever computed them was lost.
    """

    location: str
    outputs: Sequence[OutputFile]
    seconds: float
    resumed: int
    nonfinite: Mapping[str, int]
    recomputed: int = 0


def run_merge(
    prepared: Prepared, place: Path | Upload, options: Options, progress: Progress | None = None
) -> Result:
    """Merge into a folder, or a place elsewhere, which appears when everything is there.

    Args:
        prepared: From `prepare`; its inputs are closed here.
        place: Where the result goes.
        options: How to run.
        progress: Told how far it is.

    Raises:
        Interrupted: The user stopped it; the same call continues it.
        PackError: The disk is full, a file changed or broke during the run.
    """
    progress = progress or Progress()
    began = time.monotonic()
    plan, inputs = prepared.plan, prepared.inputs
    try:
        upload = place if isinstance(place, Upload) else None
        folder = place.folder if isinstance(place, Upload) else place
        check_place(folder, upload, inputs.sources.values(), options.force)
        work = MergeWork(prepared)
        writer = ArtifactWriter(folder, plan.shards, work.fingerprints[0], options.force, upload)
        try:
            return _run(work, prepared, writer, options, progress, began)
        except Interrupted:
            total = len(plan.shards)
            raise Interrupted(
                f"stopped; {len(writer.done)} of {total} output file{'s' * (total != 1)} finished",
                "Run the same command to continue.",
            ) from None
        finally:
            writer.close()
    finally:
        inputs.close()


def _run(
    work: MergeWork,
    prepared: Prepared,
    writer: ArtifactWriter,
    options: Options,
    progress: Progress,
    began: float,
) -> Result:
    if writer.discarded:
        progress.note(
            "recipe, inputs or --shard-size changed since the run that was stopped; starting afresh"
        )
    resumed = len(writer.done)
    if resumed:
        progress.note(
            f"continuing: {resumed} of {len(prepared.plan.shards)} output files were finished"
        )
    for line in prepared.notes:
        progress.note(line)
    computed = options.engine.compute(work, [writer], options.threads, options.memory, progress)
    if writer.uploads:
        progress.begin("Upload", 0)
    return _publish(prepared, writer, computed, resumed, began)


def _publish(
    prepared: Prepared,
    writer: ArtifactWriter,
    computed: Computed,
    resumed: int,
    began: float,
) -> Result:
    nonfinite: dict[str, int] = {}
    for shard in writer.done.values():
        nonfinite |= shard.get("nonfinite", {})
    files: dict[str, Any] = dict(prepared.files)
    outputs = writer.outputs(files)
    lock = make_lock(
        prepared.plan,
        prepared.inputs,
        computed.weights,
        outputs,
        dict(sorted(nonfinite.items())),
    )
    return Result(
        location=writer.location,
        outputs=writer.publish({**files, LOCK_NAME: lock}),
        seconds=time.monotonic() - began,
        resumed=resumed,
        nonfinite=nonfinite,
        recomputed=computed.recomputed,
    )


def default_threads() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_memory(memory: int) -> None:
    """Refuse a budget that no merge fits in.

    Raises:
        PackError: It is below 64 MB.
    """
    if memory < FIXED:
        raise PackError(f"--memory {memory} is too little", "Give at least 64MB.")
