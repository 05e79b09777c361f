"""A model quantized to GGUF from start to end: plan, stream, verify, lock."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporters.gguf.about import about
from exporters.gguf.export import GgufModel, Scheme
from exporters.gguf.verify import Verification, verify
from exporters.gguf.write import Kinds, Target, encode_jobs
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.errors import Interrupted
from mergekit_lite.kernels.jit import is_first_use
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.model import WholeModel
from mergekit_lite.merge.plan import Shard
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.stream import Job, run_jobs
from mergekit_lite.merge.writer import ArtifactWriter, OutputFile, refuse_existing, refuse_inputs

__all__ = ["FORMAT", "Made", "Options", "Prepared", "Request", "prepare_gguf", "run_gguf"]

FORMAT = 1
"""Raised whenever the same model begins to give other bytes; part of a fingerprint."""


@dataclass(frozen=True)
class Request:
    """One file that is wanted.

    Attributes:
        scheme: Its types.
        folder: Where the result goes.
        stem: Name of the file, without ``.gguf``.
    """

    scheme: Scheme
    folder: Path
    stem: str


@dataclass(frozen=True)
class Options:
    """How to run; none of it changes a byte of a file.

    Attributes:
        threads: Worker threads.
        memory: Bytes for weights in memory.
        force: Whether an existing result is replaced.
        verify: Whether results are verified; None for models that are small enough.
    """

    threads: int
    memory: int
    force: bool = False
    verify: bool | None = None


@dataclass(frozen=True)
class _Planned:
    request: Request
    kinds: Kinds
    shards: Sequence[Shard]


@dataclass(frozen=True)
class Prepared:
    """All that is known before any weight is read.

    Attributes:
        model: What is quantized.
        gguf: The same under GGUF's names.
        files: What is planned for each request.
    """

    model: WholeModel
    gguf: GgufModel
    files: Sequence[_Planned]

    @property
    def notes(self) -> list[str]:
        """Decisions that the user should know of."""
        return [*self.model.notes, *self.gguf.notes]

    @property
    def input_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        tensors = self.gguf.tensors
        return sum(tensors.spec(name).nbytes for name in self.gguf.names)


@dataclass(frozen=True)
class Made:
    """One result.

    Attributes:
        folder: Where it lies.
        outputs: Its files, the lock included.
        bits: Per weight, all tensors together.
        types: Number of tensors by type.
        verification: How it was checked; None where it was not.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    bits: float
    types: Mapping[str, int]
    verification: Verification | None
    seconds: float


def prepare_gguf(model: WholeModel, requests: Sequence[Request]) -> Prepared:
    """Plan files of a model; reads headers and small files only.

    Raises:
        PackError: Whatever can be found wrong without reading weights.
    """
    if isinstance(model.checkpoint, GgufCheckpoint):
        gguf = GgufModel.again(model.checkpoint)
    else:
        gguf = GgufModel.convert(model.checkpoint, model.files, about(model))
    files = []
    for request in requests:
        scheme = request.scheme
        if scheme.importance:
            scheme = replace(scheme, importance=gguf.fitted(scheme.importance, "--imatrix"))
        files.append(_Planned(replace(request, scheme=scheme), *gguf.lay_out(scheme, request.stem)))
    return Prepared(model, gguf, files)


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
            refuse_existing(planned.request.folder, options.force)
            refuse_inputs(planned.request.folder, (source.path for source in model.sources))
        writers = []
        for planned in prepared.files:
            writer = ArtifactWriter(
                planned.request.folder, planned.shards, _fingerprint(model, planned), options.force
            )
            stack.callback(writer.close)
            writers.append(writer)
        try:
            _stream(prepared, writers, options, progress)
        except Interrupted:
            raise Interrupted("stopped", "Run the same command to continue.") from None
        return _publish(prepared, writers, options, progress, began)


def _fingerprint(model: WholeModel, planned: _Planned) -> str:
    parts = [f"gguf {FORMAT}", model.fingerprint()]
    parts += [f"{name} {kind.name}" for name, kind in planned.kinds.items()]
    parts += [f"{s.name} {hashlib.sha256(s.prefix).hexdigest()}" for s in planned.shards]
    for name, importance in sorted(planned.request.scheme.importance.items()):
        parts.append(f"{name} {hashlib.sha256(importance.tobytes()).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stream(
    prepared: Prepared, writers: Sequence[ArtifactWriter], options: Options, progress: Progress
) -> None:
    targets = []
    for planned, writer in zip(prepared.files, writers, strict=True):
        if writer.discarded:
            progress.note("the model or the types changed since the run that was stopped; "
                          "starting afresh")  # fmt: skip
        names = frozenset(
            name
            for shard in planned.shards
            if shard.name not in writer.done
            for name in shard.header.entries
        )
        targets.append(Target(planned.kinds, writer, names, planned.request.scheme.importance))
    if is_first_use():
        progress.note("compiling kernels, once after installation: some seconds")
    for line in prepared.notes:
        progress.note(line)

    def abort() -> None:
        for writer in writers:
            writer.abort()

    def run(jobs: Iterator[Job]) -> None:
        run_jobs(jobs, options.threads, options.memory, progress.advance, abort)

    if any(target.names for target in targets):
        prepared.model.observe(run, progress)
        progress.begin("Quantize", prepared.input_bytes)
        run(encode_jobs(prepared.gguf.tensors, targets))


def _publish(
    prepared: Prepared,
    writers: Sequence[ArtifactWriter],
    options: Options,
    progress: Progress,
    began: float,
) -> list[Made]:
    progress.begin("Check inputs", 0)
    weights = prepared.model.input_files()
    made = []
    verifications = verify(
        prepared.model,
        prepared.gguf,
        [writer.partial / planned.shards[0].name
         for planned, writer in zip(prepared.files, writers, strict=True)],
        [planned.kinds for planned in prepared.files],
        options.verify,
        progress,
    )  # fmt: skip
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
        lock = lock_file("quantize", fields, list(prepared.model.sources), weights, outputs)
        published = writer.publish({LOCK_NAME: lock})
        made.append(
            Made(
                request.folder, published, _bits(prepared, planned), dict(sorted(counts.items())),
                checked, time.monotonic() - began,
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


def _bits(prepared: Prepared, planned: _Planned) -> float:
    """Bits per weight of all tensors of a file."""
    elements = sum(prepared.gguf.tensors.spec(name).elements for name in planned.kinds)
    stored = sum(
        entry.end - entry.start for shard in planned.shards for entry in
        shard.header.entries.values()
    )  # fmt: skip
    return 8 * stored / max(1, elements)
