"""A model whose linear layers are put on grids: plan, layer by layer, write, lock."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exporters.linears.card import quantized_card
from exporters.linears.layouts import Layout
from exporters.linears.matrices import Found, Matrix, check_fits, find_matrices
from exporters.linears.rounder import LayerResult, Rounder, WeightRounder
from exporters.linears.store import LayerStore
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.quantized import as_floats
from mergekit_lite.dtypes import Array, DType
from mergekit_lite.errors import Interrupted
from mergekit_lite.evaluate.forward import LayerRun, LayerwiseModel
from mergekit_lite.evaluate.inputs import one_expert_at_a_time
from mergekit_lite.evaluate.text import Windows
from mergekit_lite.kernels.cast import decode, encode
from mergekit_lite.kernels.jit import is_first_use
from mergekit_lite.merge.config import index_file, to_json
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.model import WholeModel
from mergekit_lite.merge.plan import Shard, lay_out
from mergekit_lite.merge.prepare import DEFAULT_SHARD
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import ArtifactWriter, OutputFile, check_place

__all__ = ["FORMAT", "MadeLinears", "Request", "run_linears"]

FORMAT = 1
"""Raised whenever the same model and text begin to give other bytes; part of a fingerprint."""


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
class MadeLinears:
    """One result.

    Attributes:
        folder: Where it lies, or passed through on its way elsewhere.
        outputs: Its files, the lock included.
        bits: Per weight, all tensors together.
        matrices: How many were put on a grid.
        notes: What the user should know.
        seconds: That it took.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    bits: float
    matrices: int
    notes: Sequence[str]
    seconds: float


def run_linears(
    model: WholeModel,
    request: Request,
    progress: Progress | None = None,
    upload: Upload | None = None,
) -> MadeLinears:
    """Quantize the linear layers of a model; the result appears when it is whole.

    Args:
        model: Left open.
        request: What is wanted.
        progress: Told how far it is.
        upload: Takes the result elsewhere; the folder is then only where it passes through.

    Raises:
        Interrupted: The user stopped it; the same call continues at the layer it was in.
        PackError: The model cannot be run layer by layer, the scheme does not fit, a weight or an
            activation is not finite, the disk is full.
    """
    began = time.monotonic()
    progress = progress or Progress()
    check_place(request.folder, upload, model.sources, request.force)
    with ExitStack() as stack:
        run = _Run(model, request, progress, stack, upload)
        try:
            return run.all(began)
        except (KeyboardInterrupt, Interrupted):
            done, count = len(run.store.done), run.count
            raise Interrupted(
                f"stopped; {done} of {count} layers finished", "Run the same command to continue."
            ) from None


class _Run:
    """One run, and what it holds."""

    def __init__(
        self,
        model: WholeModel,
        request: Request,
        progress: Progress,
        stack: ExitStack,
        upload: Upload | None,
    ) -> None:
        self._model = model
        self._request = request
        self._progress = progress
        model.observe_alone(progress)
        self._runner = LayerwiseModel(model.checkpoint, request.dtype, request.device)
        one_expert_at_a_time(self._runner.model)
        self._found: Found = find_matrices(model.checkpoint, self._runner.model, self._runner.paths)
        check_fits(self._found, request.layout.grid.scheme, model.reference)
        self.count = len(self._runner.paths)
        self._matrices: dict[str, Matrix] = {m.tensor: m for m in self._found.matrices}
        self._by_layer: dict[int, list[Matrix]] = {}
        for matrix in self._found.matrices:
            self._by_layer.setdefault(matrix.layer, []).append(matrix)
        self._shards = list(lay_out(self._planned(), DEFAULT_SHARD))
        self._written = request.layout.written(
            self._found.left,
            [m.tensor for m in self._found.matrices if m.transposed],
            request.details(),
        )
        fingerprint = self._fingerprint()
        self._writer = ArtifactWriter(
            request.folder, self._shards, fingerprint, request.force, upload
        )
        stack.callback(self._writer.close)
        self.store = LayerStore(request.folder, fingerprint, self.count)
        stack.callback(self.store.close)

    def _planned(self) -> list[tuple[str, TensorSpec]]:
        """Every tensor of the result, large types first, so that each is aligned."""
        checkpoint = self._model.checkpoint
        found: list[tuple[str, TensorSpec]] = []
        for name in checkpoint.names():
            matrix = self._matrices.get(name)
            if matrix is None:
                shape = checkpoint.spec(name).shape
                found.append((name, TensorSpec(shape, checkpoint.kept_dtype(name))))
            else:
                specs = self._request.layout.specs(matrix)
                found += [(f"{matrix.module}.{end}", spec) for end, spec in specs.items()]
        return sorted(found, key=lambda item: (-item[1].dtype.itemsize, item[0]))

    def _fingerprint(self) -> str:
        import torch
        import transformers

        request = self._request
        parts = [
            f"linears {FORMAT}, torch {torch.__version__}, transformers {transformers.__version__}",
            self._model.fingerprint(),
            json.dumps(self._written.config, sort_keys=True),
            json.dumps(
                [request.target, request.scheme, request.details(), request.asked, request.options],
                sort_keys=True,
            ),
            f"{request.device} {request.dtype}",
            *(f"{s.name} {hashlib.sha256(s.prefix).hexdigest()}" for s in self._shards),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def all(self, began: float) -> MadeLinears:
        """Do what is not done."""
        progress = self._progress
        for line in self._notes():
            progress.note(line)
        if self.store.discarded or self._writer.discarded:
            progress.note("the model, the text or the settings changed since the run that was "
                          "stopped; starting afresh")  # fmt: skip
        elif self.store.done and len(self.store.done) < self.count:
            progress.note(f"continuing: {len(self.store.done)} of {self.count} layers were done")
        if is_first_use():
            progress.note("compiling kernels, once after installation: some seconds")
        if len(self.store.done) < self.count:
            if isinstance(self._request.rounder, WeightRounder):
                self._plain(self._request.rounder)
            else:
                self._calibrated(self._request.rounder)
        self._write()
        return self._publish(began)

    def _notes(self) -> list[str]:
        return [*self._model.notes, *self._found.notes]

    def _plain(self, rounder: WeightRounder) -> None:
        checkpoint = self._model.checkpoint
        sizes = {
            index: sum(checkpoint.spec(m.tensor).nbytes for m in held)
            for index, held in self._by_layer.items()
        }
        self._progress.begin("Layers", sum(sizes.values()))
        for index in range(self.count):
            held = self._by_layer.get(index, [])
            if index not in self.store.done:
                self._keep(index, rounder.round(checkpoint, held), None)
            self._progress.advance(sizes.get(index, 0))

    def _calibrated(self, rounder: Rounder) -> None:
        windows = self._request.windows
        assert windows is not None  # noqa: S101 (a rounder that looks at activations has text)
        batches = windows.batches()
        paths = {path: index for index, path in enumerate(self._runner.paths)}

        def around(path: str, layer: Any, run: LayerRun) -> None:
            index = paths[path]
            if index in self.store.done:
                self._fill(index, layer)
            else:
                held = self._by_layer.get(index, [])
                result = rounder.round(index, layer, run, held, partial(self._as_stored, index))
                self._keep(index, result, layer)
            if index + 1 < self.count and not run.done:
                run()

        self._runner.hidden(batches, self._progress, around).close()

    def _as_stored(self, index: int, parameter: str, values: Any) -> Any:
        """A parameter of a layer after it has been in the file of the result."""
        import torch

        [part] = self._runner.names.find(f"{self._runner.paths[index]}.{parameter}")
        dtype = self._model.checkpoint.kept_dtype(part.tensor)
        wide = np.ascontiguousarray(values.float().cpu().numpy()).reshape(-1)
        raw, back = np.empty(wide.size, dtype.storage), np.empty(wide.size, np.float32)
        encode(wide, dtype, raw)
        decode(raw, dtype, back)
        return torch.from_numpy(back).reshape(values.shape).to(values)

    def _keep(self, index: int, result: LayerResult, layer: Any) -> None:
        """Put a layer's result into the store."""
        checkpoint = self._model.checkpoint
        tensors: dict[str, tuple[DType, Array]] = {}
        for matrix in self._by_layer.get(index, []):
            specs = self._request.layout.specs(matrix)
            made = self._request.layout.tensors(matrix, result.quantized[matrix.tensor])
            for end, spec in specs.items():
                tensors[f"{matrix.module}.{end}"] = spec.dtype, made[end].reshape(spec.shape)
        path = self._runner.paths[index]
        for parameter, values in result.changed.items():
            [part] = self._runner.names.find(f"{path}.{parameter}")
            dtype = checkpoint.kept_dtype(part.tensor)
            out = np.empty(values.size, dtype.storage)
            encode(np.ascontiguousarray(values, np.float32).reshape(-1), dtype, out)
            tensors[part.tensor] = dtype, out.reshape(values.shape)
        self.store.put(index, tensors, result.notes)
        for line in result.notes:
            self._progress.note(line)

    def _fill(self, index: int, layer: Any) -> None:
        """Give a layer the values of its finished result."""
        import torch

        stored = self.store.get(index)
        values = as_floats(stored, self._written.config)
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

    def _write(self) -> None:
        """Put layers and what stays as it is into the files of the result."""
        todo = [shard for shard in self._shards if shard.name not in self._writer.done]
        self._progress.begin("Write", sum(shard.size for shard in todo))
        where = {
            name: self.store.get(index) for index in sorted(self.store.done)
            for name in self.store.get(index).names()
        }  # fmt: skip
        for shard in todo:
            for name, entry in shard.header.entries.items():
                source: Checkpoint = where.get(name, self._model.checkpoint)
                at = 0
                for values in _pieces(source, name, entry.dtype):
                    self._writer.write(name, at, values)
                    at += values.nbytes
                self._writer.tensor_done(name, 0)
                self._progress.advance(entry.end - entry.start)

    def _publish(self, began: float) -> MadeLinears:
        self._progress.begin("Check inputs", 0)
        model, request = self._model, self._request
        weights = model.input_files()
        told = (note for index in range(self.count) for note in self.store.notes(index))
        notes = list(dict.fromkeys([*self._notes(), *told]))
        bits = _bits(self._shards, [model.checkpoint.spec(n) for n in model.checkpoint.names()])
        files = dict(model.files)
        config = {**model.checkpoint.config, "quantization_config": self._written.config}
        files["config.json"] = to_json(config)
        files |= {name: to_json(content) for name, content in self._written.files.items()}
        files["README.md"] = quantized_card(
            model, request.target, request.scheme, str(self._written.config["quant_method"]), bits,
            len(self._matrices), request.details(), notes,
        )  # fmt: skip
        index = index_file(self._shards)
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
        if self._writer.uploads:
            self._progress.begin("Upload", 0)
        outputs = self._writer.outputs(files)
        lock = lock_file("quantize", fields, list(model.sources), weights, outputs)
        published = self._writer.publish({**files, LOCK_NAME: lock})
        self.store.remove()
        return MadeLinears(
            request.folder, published, bits, len(self._matrices), notes, time.monotonic() - began
        )


def _pieces(source: Checkpoint, name: str, dtype: DType) -> Iterator[Array]:
    """A tensor as it is written, piece by piece."""
    spec = source.spec(name)
    if spec.dtype == dtype:
        convert: Callable[[Array], Array] = lambda raw: raw  # noqa: E731
    else:

        def convert(raw: Array) -> Array:
            wide = np.empty(raw.size, np.float64 if spec.dtype.name == "F64" else np.float32)
            decode(raw, spec.dtype, wide)
            out = np.empty(raw.size, dtype.storage)
            encode(wide, dtype, out)
            return out

    reader = source.open(name)
    try:
        if reader.passes:
            yield convert(source.read(name).reshape(-1))
            return
        for rows in spec.chunks():
            raw = np.empty(rows.size * spec.columns, spec.dtype.storage)
            reader.read(rows, raw)
            yield convert(raw)
    finally:
        reader.close()


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
        found["torch_threads"] = torch.get_num_threads()
    return found
