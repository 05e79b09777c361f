"""Files of GGUF as the work of an engine: their jobs, and how they are opened again elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.gguf.about import about
from exporters.gguf.export import GgufModel, Scheme
from exporters.gguf.verify import Verification, is_verified, verify
from exporters.gguf.write import Kinds, Target, encode_jobs
from exporters.work import ModelWork
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.engines.protocol import Portion
from mergekit_lite.merge.model import WholeModel, open_whole
from mergekit_lite.merge.plan import Shard
from mergekit_lite.merge.stream import Job
from mergekit_lite.merge.work import INTERPRETER

if TYPE_CHECKING:
    from mergekit_lite.merge.run import Progress

__all__ = ["FORMAT", "GgufOrigin", "GgufWork", "Planned", "Prepared", "Request", "prepare_gguf"]

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
class Planned:
    """What is planned for a request: the types of all tensors, and the files."""

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
    files: Sequence[Planned]

    @property
    def notes(self) -> list[str]:
        """Decisions that the user should know of."""
        return [*self.model.notes, *self.gguf.notes]

    @property
    def input_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        tensors = self.gguf.tensors
        return sum(tensors.spec(name).nbytes for name in self.gguf.names)


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
        files.append(Planned(replace(request, scheme=scheme), *gguf.lay_out(scheme, request.stem)))
    return Prepared(model, gguf, files)


@dataclass(frozen=True)
class GgufOrigin:
    """Files of a model as plain data.

    Attributes:
        reference: Of the model.
        home: Folder that it starts from; absolute.
        requests: What is wanted.
        verify: Whether results are verified; None for models that are small enough.
    """

    reference: str
    home: Path
    requests: tuple[Request, ...]
    verify: bool | None

    def open(self) -> GgufWork:
        """Open the model and plan the files."""
        model = open_whole(self.reference, self.home)
        try:
            return GgufWork(prepare_gguf(model, self.requests), self.verify)
        except BaseException:
            model.close()
            raise


class GgufWork(ModelWork):
    """Files that are planned, their model open."""

    title = "Quantize"

    def __init__(self, prepared: Prepared, verify: bool | None) -> None:
        model = prepared.model
        super().__init__(model)
        self._prepared = prepared
        self._verify = verify
        requests = tuple(planned.request for planned in prepared.files)
        self.origin = GgufOrigin(model.reference, model.home.absolute(), requests, verify)
        self.results = [planned.shards for planned in prepared.files]
        self.fingerprints = [_fingerprint(model, planned) for planned in prepared.files]
        self.checked = is_verified(prepared.gguf, verify)

    def jobs(self, portions: Sequence[Portion]) -> Iterator[Job]:
        """The jobs that encode some tensors, each read once for all files."""
        targets = []
        for portion in portions:
            planned = self._prepared.files[portion.result]
            importance = planned.request.scheme.importance
            targets.append(Target(planned.kinds, portion.sink, portion.names, importance))
        return encode_jobs(self._prepared.gguf.tensors, targets)

    def job_bytes(self, portions: Sequence[Portion]) -> int:
        """Bytes of the tensors that are read."""
        tensors = self._prepared.gguf.tensors
        wanted = frozenset().union(*(portion.names for portion in portions))
        return sum(tensors.spec(name).nbytes for name in wanted)

    def peak_bytes(self, memory: int, threads: int) -> int:
        """Upper estimate of the resident memory of a process that runs jobs."""
        return INTERPRETER + memory

    def check(self, folders: Sequence[Path], progress: Progress) -> Sequence[Verification | None]:
        """Verify what was written."""
        files = self._prepared.files
        return verify(
            self._prepared.model,
            self._prepared.gguf,
            [folder / p.shards[0].name for p, folder in zip(files, folders, strict=True)],
            [planned.kinds for planned in files],
            self._verify,
            progress,
        )


def _fingerprint(model: WholeModel, planned: Planned) -> str:
    parts = [f"gguf {FORMAT}", model.fingerprint()]
    parts += [f"{name} {kind.name}" for name, kind in planned.kinds.items()]
    parts += [f"{s.name} {hashlib.sha256(s.prefix).hexdigest()}" for s in planned.shards]
    for name, importance in sorted(planned.request.scheme.importance.items()):
        parts.append(f"{name} {hashlib.sha256(importance.tobytes()).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
