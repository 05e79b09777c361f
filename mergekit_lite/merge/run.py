"""A merge from start to end: plan, stream, write, lock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.checkpoint.announce import announce
from mergekit_lite.checkpoint.protocol import InputFile, Rows, TensorReader
from mergekit_lite.errors import Interrupted, PackError
from mergekit_lite.kernels.cast import in_kernel
from mergekit_lite.kernels.fuse import count_nonfinite
from mergekit_lite.kernels.jit import TILE, is_first_use
from mergekit_lite.merge.buffers import BufferPool
from mergekit_lite.merge.checkpoint import MergeCheckpoint, MergeReader
from mergekit_lite.merge.config import small_files
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.inputs import Inputs, open_inputs
from mergekit_lite.merge.lock import LOCK_NAME, make_lock
from mergekit_lite.merge.plan import Plan, make_plan, scratch_bytes
from mergekit_lite.merge.stream import Job, run_jobs
from mergekit_lite.merge.writer import ArtifactWriter, OutputFile, refuse_existing, refuse_inputs
from mergekit_lite.recipe import Recipe
from mergekit_lite.tokenizer.choose import Tokenizer, choose_tokenizer

__all__ = ["Options", "Prepared", "Progress", "Result", "observing", "prepare", "run_merge"]

DEFAULT_MEMORY = 512 * 10**6
DEFAULT_SHARD = 2 * 10**9
_POOL = BufferPool()
_INTERPRETER = 250 * 10**6
_FIXED = 64 * 10**6


@dataclass(frozen=True)
class Options:
    """How to run; none of it changes a byte of the result but ``shard_bytes``.

    Attributes:
        threads: Worker threads.
        memory: Bytes for weights in memory.
        shard_bytes: Most bytes of an output file.
        force: Whether an existing result is replaced.
    """

    threads: int
    memory: int = DEFAULT_MEMORY
    shard_bytes: int = DEFAULT_SHARD
    force: bool = False


class Progress:
    """What a run tells while it goes on; the command line shows it, everyone else ignores it."""

    def begin(self, title: str, total: int) -> None:
        """A stage of so many bytes begins."""

    def advance(self, count: int) -> None:
        """Bytes are done; called by any thread."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Prepared:
    """All that is known before any weight is read."""

    plan: Plan
    inputs: Inputs
    tokenizer: Tokenizer
    files: Mapping[str, bytes]

    @property
    def notes(self) -> list[str]:
        """Decisions that the user should know of."""
        return [*self.inputs.notes, *self.plan.notes.lines, *self.tokenizer.notes]


@dataclass(frozen=True)
class Result:
    """What a merge made.

    Attributes:
        location: Where it lies: a folder, or the address that it was uploaded to.
        outputs: Its files, the lock included.
        seconds: Wall time.
        resumed: Shards that an earlier run had finished.
        nonfinite: Number of NaN and infinite elements, by tensor that has some.
    """

    location: str
    outputs: Sequence[OutputFile]
    seconds: float
    resumed: int
    nonfinite: Mapping[str, int]


def prepare(recipe: Recipe, home: Path, shard_bytes: int = DEFAULT_SHARD) -> Prepared:
    """Open the models and plan the merge; reads headers and small files only.

    Args:
        recipe: A checked recipe.
        home: Folder that relative paths start from.
        shard_bytes: Most bytes of an output file.

    Raises:
        PackError: Whatever can be found wrong without reading weights.
    """
    inputs = open_inputs(recipe, home)
    try:
        plan = make_plan(recipe, inputs, shard_bytes)
        wanted = recipe.tokenizer.source if recipe.tokenizer else recipe.tokenizer_source
        folders = {name: model.checkpoint.folder for name, model in inputs.items()}
        tokenizer = choose_tokenizer(folders, plan.template, wanted, recipe.chat_template)
        files = {**small_files(plan, inputs), **tokenizer.files}
    except BaseException:
        inputs.close()
        raise
    return Prepared(plan, inputs, tokenizer, files)


class _WriteJob(Job):
    """Merges one tensor and writes it."""

    def __init__(self, name: str, reader: TensorReader, writer: ArtifactWriter) -> None:
        super().__init__(reader)
        self._name = name
        self._writer = writer
        self._row_bytes = reader.spec.columns * reader.spec.dtype.itemsize
        self.nonfinite = 0

    def finish(self, rows: Rows) -> None:
        spec = self.reader.spec
        count = rows.size * spec.columns
        held = _POOL.take(count * spec.dtype.itemsize)
        out = held[: count * spec.dtype.itemsize].view(spec.dtype.storage)
        self.reader.read(rows, out)
        if in_kernel(spec.dtype):
            work = np.float64 if spec.dtype.name == "F64" else np.float32
            self.nonfinite += count_nonfinite(out, np.empty((1, TILE), work))
        elif spec.dtype.name == "F16":
            self.nonfinite += int(np.count_nonzero(~np.isfinite(out)))
        self._writer.write(self._name, rows.start * self._row_bytes, out)
        _POOL.give(held)

    def done(self) -> None:
        self._writer.tensor_done(self._name, self.nonfinite)


class _ObserveJob(Job):
    """Shows one tensor to the statistic that spans the model, in one of its passes."""

    def __init__(self, reader: MergeReader, index: int) -> None:
        super().__init__(reader)
        self._index = reader.inner_passes + index

    def finish(self, rows: Rows) -> None:
        self.reader.observe(self._index, rows)

    def done(self) -> None:
        pass


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
        if upload is None:
            refuse_existing(folder, options.force)
            refuse_inputs(folder, (source.path for source in inputs.sources.values()))
        else:
            upload.refuse_inputs(inputs.sources)
        fingerprint = plan.fingerprint(inputs)
        writer = ArtifactWriter(folder, plan.shards, fingerprint, options.force, upload)
        try:
            return _run(prepared, writer, options, progress, began)
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
    prepared: Prepared, writer: ArtifactWriter, options: Options, progress: Progress, began: float
) -> Result:
    plan, inputs = prepared.plan, prepared.inputs
    if writer.discarded:
        progress.note(
            "recipe, inputs or --shard-size changed since the run that was stopped; starting afresh"
        )
    if is_first_use():
        progress.note("compiling kernels, once after installation: some seconds")
    resumed = len(writer.done)
    if resumed:
        progress.note(f"continuing: {resumed} of {len(plan.shards)} output files were finished")
    for line in prepared.notes:
        progress.note(line)
    memory = max(0, options.memory - _FIXED - scratch_bytes(plan, options.threads))
    run: Callable[[Iterator[Job]], None] = lambda jobs: run_jobs(  # noqa: E731
        jobs, options.threads, memory, progress.advance, writer.abort
    )
    todo = [
        name
        for shard in plan.shards
        if shard.name not in writer.done
        for name in shard.header.entries
    ]
    merged = MergeCheckpoint(plan, inputs)
    if todo:
        observing(merged, run, progress)
        announce(merged.prefetch, todo)
        progress.begin("Merge", sum(plan.tensors[name].spec.nbytes for name in todo))
        run(_writing(merged, todo, writer))
    weights = _finish_inputs(inputs, progress)
    if writer.uploads:
        progress.begin("Upload", 0)
    return _publish(prepared, writer, weights, resumed, began)


def _writing(
    merged: MergeCheckpoint, names: Sequence[str], writer: ArtifactWriter
) -> Iterator[Job]:
    for at, name in enumerate(names):
        for ahead in names[at + 1 : at + 3] if at else names[:3]:
            merged.prefetch(ahead)
        yield _WriteJob(name, merged.open(name), writer)


def observing(
    merged: MergeCheckpoint, run: Callable[[Iterator[Job]], None], progress: Progress
) -> None:
    """Show a statistic that spans the model all tensors, before the first of them is read.

    Args:
        merged: A merge; nothing happens if its method needs no such statistic.
        run: Runs jobs on all threads.
        progress: Told of each pass.
    """
    statistic = merged.spanning
    if statistic is None:
        return
    total = sum(merged.spec(name).nbytes for name in merged.names())
    index = 0
    while index < statistic.passes:
        progress.begin(f"Trim {index + 1}/{statistic.passes}", total)
        announce(merged.prefetch, merged.names())
        run(_observe_jobs(merged, index))
        statistic.settle(index)
        index += 1


def _observe_jobs(merged: MergeCheckpoint, index: int) -> Iterator[Job]:
    for name in merged.names():
        reader = merged.open_spanning(name)
        if reader is not None:
            yield _ObserveJob(reader, index)


def _finish_inputs(inputs: Inputs, progress: Progress) -> dict[str, list[InputFile]]:
    """Hash what has not been read, and check that no input changed."""
    progress.begin("Check inputs", 0)
    hosts = {host for s in inputs.sources.values() for host in s.checkpoint.elsewhere()}
    if hosts:
        from mergekit_lite.checkpoint.far.traffic import note_rate

        note_rate(hosts)
    return {name: s.checkpoint.input_files() for name, s in inputs.sources.items()}


def _publish(
    prepared: Prepared,
    writer: ArtifactWriter,
    weights: Mapping[str, Sequence[InputFile]],
    resumed: int,
    began: float,
) -> Result:
    nonfinite: dict[str, int] = {}
    for shard in writer.done.values():
        nonfinite |= shard.get("nonfinite", {})
    files: dict[str, Any] = dict(prepared.files)
    outputs = writer.outputs(files)
    lock = make_lock(
        prepared.plan, prepared.inputs, weights, outputs, dict(sorted(nonfinite.items()))
    )
    return Result(
        location=writer.location,
        outputs=writer.publish({**files, LOCK_NAME: lock}),
        seconds=time.monotonic() - began,
        resumed=resumed,
        nonfinite=nonfinite,
    )


def peak_memory(plan: Plan, memory: int, threads: int) -> int:
    """Upper estimate of the resident memory of a run, in bytes.

    The interpreter and its libraries, the budget or what the largest tensors need of it, and the
    chunk buffers of all threads.
    """
    largest = max(
        (t.spec.elements * len(t.sources) * plan.work.itemsize for t in plan.tensors.values()),
        default=0,
    )
    return _INTERPRETER + min(memory, threads * largest + scratch_bytes(plan, threads))


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
    if memory < _FIXED:
        raise PackError(f"--memory {memory} is too little", "Give at least 64MB.")
