"""A model whose linear layers are put on grids, as the work of an engine.

Its steps are its decoder layers. Where a rounder looks at weights alone, each is a step of its own,
and they may be done in any order, by anybody. Where it looks at activations, a layer gets what
comes out of the rounded ones before it, so all of them are one step: it keeps each layer that is
finished beside the result, and goes on there when it is begun again. Files are then copied from
these layers and from the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.linears.layouts import Layout
from exporters.linears.matrices import Found, Matrix, check_fits, find_matrices
from exporters.linears.rounder import LayerResult, Rounder, WeightRounder
from exporters.linears.store import LayerStore
from exporters.work import ModelWork
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import (
    Checkpoint,
    Rows,
    TensorReader,
    TensorSpec,
)
from mergekit_lite.checkpoint.quantized import as_floats
from mergekit_lite.dtypes import Array, DType
from mergekit_lite.engines.protocol import Portion, Sink, Step
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import ACTIVATIONS, LayerRun, LayerwiseModel, set_threads
from mergekit_lite.evaluate.inputs import one_expert_at_a_time
from mergekit_lite.evaluate.text import Windows
from mergekit_lite.kernels.cast import decode, encode
from mergekit_lite.merge.model import WholeModel, open_whole
from mergekit_lite.merge.plan import lay_out
from mergekit_lite.merge.prepare import DEFAULT_SHARD
from mergekit_lite.merge.stream import Job

if TYPE_CHECKING:
    from mergekit_lite.merge.run import Progress

__all__ = ["FORMAT", "LinearsOrigin", "LinearsWork", "Request"]

FORMAT = 1
"""Raised whenever the same model and text begin to give other bytes; part of a fingerprint."""

_LIBRARIES = 600 * 10**6
"""Bytes of the interpreter with torch and transformers."""


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
        target: Name of the format for people and locks: ``gptq``, ``awq`` …
        scheme: As the user wrote it.
        layout: How it lies in files.
        rounder: What decides the codes; one that looks at weights alone, or at activations.
        windows: Calibration text; None for a rounder that looks at weights alone.
        folder: Where the result goes.
        asked: What was asked for, as a recipe would.
        options: What was asked for besides, which no recipe says.
        threads: Worker threads; torch's, where the model is run.
        device: torch's, that layers are run on.
        dtype: That layers are computed in.
        force: Whether an existing result is replaced.
    """

    target: str
    scheme: str
    layout: Layout
    rounder: Rounder | WeightRounder
    windows: Windows | None
    folder: Path
    asked: Mapping[str, Any]
    options: Mapping[str, Any]
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    force: bool = False

    def details(self) -> dict[str, Any]:
        """How it is computed, for config and lock."""
        found = dict(self.rounder.details())
        if self.windows is not None:
            found["calibration"] = self.windows.describe()
        return found


@dataclass(frozen=True)
class LinearsOrigin:
    """A model that is to be put on grids, as plain data.

    Attributes:
        reference: Of the model.
        home: Folder that it starts from; absolute.
        request: What is wanted, its folder absolute.
    """

    reference: str
    home: Path
    request: Request

    def open(self) -> LinearsWork:
        """Open the model and plan."""
        model = open_whole(self.reference, self.home)
        try:
            return LinearsWork(model, self.request)
        except BaseException:
            model.close()
            raise


class LinearsWork(ModelWork):
    """What is planned, the model open.

    Attributes:
        request: What is wanted.
        found: Its matrices.
        matrices: Those that are put on a grid, by name of their tensor.
        shards: The files of the result.
        written: What config and small files say of the format.
        count: Number of layers.
        store: The finished ones.
    """

    title = "Write"
    steps_title = "Layers"
    libraries = ("torch", "transformers")

    def __init__(self, model: WholeModel, request: Request) -> None:
        super().__init__(model)
        self.request = request
        self._runner = LayerwiseModel(model.checkpoint, request.dtype, request.device)
        one_expert_at_a_time(self._runner.model)
        self.found: Found = find_matrices(model.checkpoint, self._runner.model, self._runner.paths)
        check_fits(self.found, request.layout.grid.scheme, model.reference)
        self.count = len(self._runner.paths)
        self.matrices: dict[str, Matrix] = {m.tensor: m for m in self.found.matrices}
        self._by_layer: dict[int, list[Matrix]] = {}
        for matrix in self.found.matrices:
            self._by_layer.setdefault(matrix.layer, []).append(matrix)
        self.shards = list(lay_out(self._planned(), DEFAULT_SHARD))
        self.written = request.layout.written(
            self.found.left,
            [m.tensor for m in self.found.matrices if m.transposed],
            request.details(),
        )
        self.origin = LinearsOrigin(model.reference, model.home.absolute(), _plain(request))
        self.results = [self.shards]
        self.fingerprints = [self._fingerprint()]
        self.store = LayerStore(request.folder, self.fingerprints[0], self.count)
        if not isinstance(request.rounder, WeightRounder):
            self.step_threads = request.threads

    def _planned(self) -> list[tuple[str, TensorSpec]]:
        """Every tensor of the result, large types first, so that each is aligned."""
        checkpoint = self.model.checkpoint
        found: list[tuple[str, TensorSpec]] = []
        for name in checkpoint.names():
            matrix = self.matrices.get(name)
            if matrix is None:
                shape = checkpoint.spec(name).shape
                found.append((name, TensorSpec(shape, checkpoint.kept_dtype(name))))
            else:
                specs = self.request.layout.specs(matrix)
                found += [(f"{matrix.module}.{end}", spec) for end, spec in specs.items()]
        return sorted(found, key=lambda item: (-item[1].dtype.itemsize, item[0]))

    def _fingerprint(self) -> str:
        import torch
        import transformers

        request = self.request
        parts = [
            f"linears {FORMAT}, torch {torch.__version__}, transformers {transformers.__version__}",
            self.model.fingerprint(),
            json.dumps(self.written.config, sort_keys=True),
            json.dumps(
                [request.target, request.scheme, request.details(), request.asked, request.options],
                sort_keys=True,
            ),
            f"{request.device} {request.dtype}",
            "" if request.windows is None else f"{request.threads} threads",
            *(f"{s.name} {hashlib.sha256(s.prefix).hexdigest()}" for s in self.shards),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def steps(self) -> list[Step]:
        """The layers that are not finished, or all of them as one."""
        done = frozenset(self.store.done)
        missing = [index for index in range(self.count) if index not in done]
        if isinstance(self.request.rounder, WeightRounder):
            return [Step(index, f"layer {index}", self._layer_bytes(index)) for index in missing]
        return [Step(0, "layers", sum(map(self._layer_bytes, missing)))] if missing else []

    def _layer_bytes(self, index: int) -> int:
        specs = (self.model.checkpoint.spec(m.tensor) for m in self._by_layer.get(index, []))
        return sum(spec.nbytes for spec in specs)

    def stepped(self) -> int:
        """Bytes of the layers that are finished."""
        return sum(map(self._layer_bytes, self.store.listed()))

    def do(
        self, steps: Sequence[Step], attempts: Sequence[Path], threads: int, progress: Progress
    ) -> None:
        """Round layers, and keep them."""
        [folder] = attempts
        if isinstance(self.request.rounder, WeightRounder):
            self._each(self.request.rounder, steps, folder, threads, progress)
        elif steps:
            set_threads(threads)
            self._in_order(self.request.rounder, folder, progress)

    def _each(
        self,
        rounder: WeightRounder,
        steps: Sequence[Step],
        attempts: Path,
        threads: int,
        progress: Progress,
    ) -> None:
        progress.begin(self.steps_title, sum(step.size for step in steps))
        for step in steps:
            if not self.store.has(step.number):
                held = self._by_layer.get(step.number, [])
                result = rounder.round(self.model.checkpoint, held, threads)
                self._keep(step.number, result, attempts)
            progress.advance(step.size)

    def _in_order(self, rounder: Rounder, attempts: Path, progress: Progress) -> None:
        windows = self.request.windows
        assert windows is not None  # noqa: S101 (a rounder that looks at activations has text)
        paths = {path: index for index, path in enumerate(self._runner.paths)}

        def around(path: str, layer: Any, run: LayerRun) -> None:
            index = paths[path]
            if self.store.has(index):
                self._fill(index, layer)
            else:
                held = self._by_layer.get(index, [])
                result = rounder.round(index, layer, run, held, partial(self._as_stored, index))
                self._keep(index, result, attempts)
            if index + 1 < self.count and not run.done:
                run()

        self._runner.hidden(windows.batches(), progress, around).close()

    def _as_stored(self, index: int, parameter: str, values: Any) -> Any:
        """A parameter of a layer after it has been in the file of the result."""
        import torch

        [part] = self._runner.names.find(f"{self._runner.paths[index]}.{parameter}")
        dtype = self.model.checkpoint.kept_dtype(part.tensor)
        wide = np.ascontiguousarray(values.float().cpu().numpy()).reshape(-1)
        raw, back = np.empty(wide.size, dtype.storage), np.empty(wide.size, np.float32)
        encode(wide, dtype, raw)
        decode(raw, dtype, back)
        return torch.from_numpy(back).reshape(values.shape).to(values)

    def _keep(self, index: int, result: LayerResult, attempts: Path) -> None:
        """Put a layer's result into the store."""
        checkpoint = self.model.checkpoint
        tensors: dict[str, tuple[DType, Array]] = {}
        for matrix in self._by_layer.get(index, []):
            specs = self.request.layout.specs(matrix)
            made = self.request.layout.tensors(matrix, result.quantized[matrix.tensor])
            for end, spec in specs.items():
                tensors[f"{matrix.module}.{end}"] = spec.dtype, made[end].reshape(spec.shape)
        path = self._runner.paths[index]
        for parameter, values in result.changed.items():
            [part] = self._runner.names.find(f"{path}.{parameter}")
            dtype = checkpoint.kept_dtype(part.tensor)
            out = np.empty(values.size, dtype.storage)
            encode(np.ascontiguousarray(values, np.float32).reshape(-1), dtype, out)
            tensors[part.tensor] = dtype, out.reshape(values.shape)
        self.store.put(index, tensors, result.notes, attempts)

    def _fill(self, index: int, layer: Any) -> None:
        """Give a layer the values of its finished result."""
        import torch

        stored = self.store.get(index)
        values = as_floats(stored, self.written.config)
        for matrix in self._by_layer.get(index, []):
            found = read_float(values, matrix.tensor)
            found = found.T if matrix.transposed else found
            matrix.of(layer).copy_(torch.from_numpy(np.ascontiguousarray(found)))
        path = self._runner.paths[index]
        known = frozenset(stored.names())
        for name, parameter in layer.named_parameters():
            places = self._runner.names.find(f"{path}.{name}")
            if len(places) == 1 and places[0].tensor in known:
                found = read_float(stored, places[0].tensor)
                parameter.copy_(torch.from_numpy(found).reshape(parameter.shape))

    def step_bytes(self, threads: int) -> int:
        """Upper estimate of the resident memory of a process that rounds layers.

        Of a layer in float32: the weights twice and their codes, or the largest matrix and what it
        is merged from. Of activations: for each number of columns a Gram matrix and its inverse,
        and the hidden states; what is embedded.
        """
        spec = self.model.checkpoint.spec
        layers = [[spec(m.tensor).elements for m in held] for held in self._by_layer.values()]
        whole, largest = max(map(sum, layers)), max(map(max, layers))
        models = 1 if self.model.prepared is None else len(self.model.sources)
        if isinstance(self.request.rounder, WeightRounder):
            return _LIBRARIES + 4 * (models + 3) * largest + 4 * whole
        grams = sum(8 * c * c for c in {m.shape[1] for m in self.found.matrices})
        outside = max((spec(n).elements for n in self.model.checkpoint.names()
                       if n not in self.matrices), default=0)  # fmt: skip
        return _LIBRARIES + 4 * models * largest + 12 * whole + grams + self._states() + 4 * outside

    def _states(self) -> int:
        """Bytes of hidden states that are held in memory."""
        windows = self.request.windows
        hidden = self._runner.model.get_input_embeddings().weight.shape[1]
        tokens = 0 if windows is None else len(windows.ids) * windows.context
        return int(min(ACTIVATIONS, 4 * tokens * hidden))

    def jobs(self, portions: Sequence[Portion]) -> Iterator[Job]:
        """The jobs that copy tensors from layers, or from the model, in the order of the files."""
        [portion] = portions
        where = {
            name: self.store.get(i) for i in self.store.done for name in self.store.get(i).names()
        }
        for shard in self.shards:
            for name, entry in shard.header.entries.items():
                if name in portion.names:
                    source = where.get(name) or self._of_model(name)
                    yield _CopyJob(name, source.open(name), entry.dtype, portion.sink)

    def _of_model(self, name: str) -> Checkpoint:
        try:
            self.model.checkpoint.spec(name)
        except KeyError:
            raise PackError(
                f"'{name}': the layer that holds it is not beside {self.request.folder}",
                "Run the same command again; choose a folder that all nodes share: -o DIR",
            ) from None
        return self.model.checkpoint

    def job_bytes(self, portions: Sequence[Portion]) -> int:
        """Bytes of the tensors, as they are written."""
        wanted = frozenset().union(*(portion.names for portion in portions))
        entries = (item for shard in self.shards for item in shard.header.entries.items())
        return sum(entry.end - entry.start for name, entry in entries if name in wanted)

    def peak_bytes(self, memory: int, threads: int) -> int:
        """Upper estimate of the resident memory of a process that runs jobs."""
        return _LIBRARIES + memory

    def close(self) -> None:
        """Close the layers and the model."""
        self.store.close()
        super().close()


class _CopyJob(Job):
    """Copies a tensor, in the type that the result has."""

    def __init__(self, name: str, reader: TensorReader, dtype: DType, sink: Sink) -> None:
        super().__init__(reader)
        self._name = name
        self._dtype = dtype
        self._sink = sink

    def input_bytes(self, rows: Rows) -> int:
        """Bytes that are written."""
        return rows.size * self.reader.spec.columns * self._dtype.itemsize

    def finish(self, rows: Rows) -> None:
        """Copy rows."""
        spec = self.reader.spec
        raw = np.empty(rows.size * spec.columns, spec.dtype.storage)
        self.reader.read(rows, raw)
        at = rows.start * spec.columns * self._dtype.itemsize
        self._sink.write(self._name, at, _as(raw, spec.dtype, self._dtype))

    def done(self) -> None:
        """The tensor is written."""
        self._sink.tensor_done(self._name, 0)


def _as(raw: Array, stored: DType, wanted: DType) -> Array:
    """Elements in another type."""
    if stored == wanted:
        return raw
    wide = np.empty(raw.size, np.float64 if stored.name == "F64" else np.float32)
    decode(raw, stored, wide)
    out = np.empty(raw.size, wanted.storage)
    encode(wide, wanted, out)
    return out


def _plain(request: Request) -> Request:
    """A request that can travel: it says where its folder is, and has no text but its tokens."""
    windows = request.windows
    if windows is not None:
        windows = replace(windows, text=replace(windows.text, documents=()))
    return replace(request, folder=request.folder.absolute(), windows=windows)
