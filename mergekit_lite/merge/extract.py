"""An adapter from a full fine-tune: what it changed in its base, module by module, as factors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.adapters.factor import Factored, Target, check_device, factor_matrix
from mergekit_lite.adapters.lora import Part
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.adapters.write import BaseName, NewAdapter, NewModule
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array, DType
from mergekit_lite.errors import PackError
from mergekit_lite.merge.adapter_output import write_adapter
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import OutputFile, refuse_inputs

__all__ = ["ExtractOptions", "Extracted", "Extraction", "run_extract"]


@dataclass(frozen=True)
class ExtractOptions:
    """How to extract.

    Attributes:
        target: What to keep of each module's change.
        save_below: Embeddings of which factors would keep a smaller share are saved whole.
        dtype: Type of the factors.
        device: Where factors are computed: ``cpu``, or a CUDA device.
        force: Whether an existing result of pack is replaced.
    """

    target: Target
    save_below: float
    dtype: DType
    device: str = "cpu"
    force: bool = False


@dataclass(frozen=True)
class Extracted:
    """What became of one module.

    Attributes:
        path: Of the module.
        factored: Its factors.
        change: Frobenius norm of its change, relative to that of the base's weight.
    """

    path: str
    factored: Factored
    change: float


@dataclass(frozen=True)
class Extraction:
    """What an extraction made.

    Attributes:
        folder: Where it lies.
        outputs: Its files, the lock included.
        seconds: Wall time.
        modules: Modules that became factors.
        whole: Parameters that are saved whole.
        energy: Share of the squared norm of the whole change that the adapter carries.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    seconds: float
    modules: Sequence[Extracted]
    whole: Sequence[str]
    energy: float


@dataclass(frozen=True)
class _Layer:
    """A module whose weight can be adapted."""

    path: str
    tensor: str
    kind: str  # linear, conv1d or embedding
    bias: str | None


def run_extract(
    tuned: Source, base: Source, folder: Path, options: ExtractOptions, progress: Progress
) -> Extraction:
    """Extract an adapter; both models stay open.

    Raises:
        PackError: The models are not of one shape, or a change cannot be carried by an adapter.
    """
    began = time.monotonic()
    check_device(options.device)
    _check_same(tuned.checkpoint, base.checkpoint)
    refuse_inputs(folder, (tuned.path, base.path))
    return _Extractor(tuned, base, options, progress).run(folder, began)


def _check_same(tuned: Checkpoint, base: Checkpoint) -> None:
    """Find every difference of names and shapes before any weight is read."""
    names, others = set(tuned.names()), set(base.names())
    wrong = [f"'{n}' is in {base.label} alone" for n in sorted(others - names)]
    wrong += [f"'{n}' is in {tuned.label} alone" for n in sorted(names - others)]
    vocabulary = False
    for name in sorted(names & others):
        shape, other = tuned.spec(name).shape, base.spec(name).shape
        if shape != other:
            wrong.append(f"'{name}' is {list(shape)}, in {base.label} {list(other)}")
            vocabulary |= len(shape) == 2 and shape[1:] == other[1:]
    if wrong:
        more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        listed = "".join(f"\n  {line}" for line in wrong[:10])
        raise PackError(
            f"{tuned.label} is no fine-tune of {base.label}:{listed}{more}",
            "The vocabularies differ; an adapter cannot resize embeddings. Resize the base first."
            if vocabulary
            else "Give the base that it was trained from.",
        )


class _Extractor:
    def __init__(
        self, tuned: Source, base: Source, options: ExtractOptions, progress: Progress
    ) -> None:
        self._sources = [*tuned.sources, *base.sources]
        self._tuned = tuned.checkpoint
        self._base = base
        self._options = options
        self._progress = progress
        self._names = ModelNames(base.checkpoint)
        self._layers = list(self._find_layers())
        self._total = 0.0
        self._kept = 0.0

    def run(self, folder: Path, began: float) -> Extraction:
        base = self._base
        new = NewAdapter(
            base=BaseName(base.reference.partition("@")[0], base.revision),
            fan_in_fan_out=any(layer.kind == "conv1d" for layer in self._layers),
            task=_task(base.checkpoint.config),
            dtype=self._options.dtype,
        )
        self._progress.begin("Extract", sum(self._size(name) for name in self._tuned.names()))
        done: list[Extracted] = []
        unchanged: list[str] = []
        adapted: set[str] = set()
        for layer in self._layers:
            adapted |= {layer.tensor, layer.bias or layer.tensor}
            found = self._layer(layer, new)
            if found is not None:
                done.append(found)
            elif not any(name.startswith(layer.path + ".") for name in new.whole):
                unchanged.append(layer.path)
        self._rest(adapted, new)
        new.tied = self._tied(new)
        new.others = [path for path in unchanged if path]
        fields = {
            "name": folder.name,
            "target": {"rank": self._options.target.rank, "energy": self._options.target.energy},
            "save_below": self._options.save_below,
            "energy": round(self._share(), 9),
            "modules": {
                e.path: {"rank": e.factored.rank, "energy": round(e.factored.kept, 9)} for e in done
            },
            "whole": sorted(new.whole),
        }
        outputs = write_adapter(
            new, folder, "extract", fields, self._sources, force=self._options.force
        )
        seconds = time.monotonic() - began
        return Extraction(folder, outputs, seconds, done, sorted(new.whole), self._share())

    def _tied(self, new: NewAdapter) -> tuple[str, str] | None:
        """The changed input embedding, and the output embedding that shares its tensor."""
        if self._base.checkpoint.config.get("tie_word_embeddings") is not True:
            return None
        embedding, head = self._names.input_embedding(), self._names.output_embedding()
        changed = {m.path for m in new.modules} | {n.removesuffix(".weight") for n in new.whole}
        if embedding not in changed or head is None or self._one(f"{head}.weight") is not None:
            return None
        return embedding, head

    def _share(self) -> float:
        return self._kept / self._total if self._total else 1.0

    def _size(self, name: str) -> int:
        return self._tuned.spec(name).nbytes

    def _find_layers(self) -> Iterator[_Layer]:
        """The modules of the model that a LoRA can be put on, with their tensors."""
        kinds = {"Linear": "linear", "Conv1D": "conv1d", "Embedding": "embedding"}
        seen: set[str] = set()
        for path, module in self._names.model.named_modules():
            ancestry = [cls.__name__ for cls in type(module).__mro__]
            kind = next((kinds[name] for name in ancestry if name in kinds), None)
            weight = self._one(f"{path}.weight")
            if kind is None or weight is None or weight in seen:
                continue
            if len(self._base.checkpoint.spec(weight).shape) == 2:
                seen.add(weight)
                yield _Layer(path, weight, kind, self._one(f"{path}.bias"))

    def _one(self, parameter: str) -> str | None:
        places: tuple[Part, ...] = self._names.find(parameter)
        plain = len(places) == 1 and places[0].expert is None
        return places[0].tensor if plain else None

    def _change(self, name: str) -> tuple[Array, Array, float]:
        """The fine-tune's tensor, its change in float64, and the norm of the base's tensor."""
        tuned = read_float(self._tuned, name)
        base = read_float(self._base.checkpoint, name)
        change = tuned.astype(np.float64)
        change -= base
        self._total += _squares(change)
        self._progress.advance(self._size(name))
        return tuned, change, float(np.linalg.norm(base))

    def _layer(self, layer: _Layer, new: NewAdapter) -> Extracted | None:
        """Factor the change of one layer; None if there is none, or it is saved whole."""
        tuned, change, size = self._change(layer.tensor)
        bias = self._bias(layer, new)
        squares = _squares(change)
        if squares == 0.0 and bias is None:
            return None
        turned = layer.kind != "linear"
        try:
            factored = factor_matrix(
                change.T if turned else change, self._options.target, self._options.device
            )
        except PackError as error:
            raise PackError(f"'{layer.tensor}' {error.message}", error.hint) from None
        if self._is_embedding(layer) and factored.kept < self._options.save_below:
            self._kept += squares
            self._carry(f"{layer.path}.weight", layer.tensor, tuned, new)
            return None
        self._kept += squares * factored.kept
        embedding = layer.kind == "embedding"
        new.modules.append(NewModule(layer.path, factored.a, factored.b, embedding, bias))
        return Extracted(layer.path, factored, squares**0.5 / max(size, 1e-300))

    def _carry(self, parameter: str, tensor: str, tuned: Array, new: NewAdapter) -> None:
        """Carry a tensor whole, in the type in which the fine-tune has it."""
        new.whole[parameter] = tuned
        new.stored_as[parameter] = self._tuned.kept_dtype(tensor)

    def _bias(self, layer: _Layer, new: NewAdapter) -> Array | None:
        if layer.bias is None:
            return None
        tuned, change, _ = self._change(layer.bias)
        self._kept += _squares(change)
        return tuned.astype(np.float32) if change.any() else None

    def _is_embedding(self, layer: _Layer) -> bool:
        head = self._names.output_embedding()
        return layer.kind == "embedding" or layer.path == head

    def _rest(self, adapted: set[str], new: NewAdapter) -> None:
        """What is no layer's weight or bias: whole modules, where it changed."""
        parameters = {
            place.tensor: name
            for name, _ in self._names.model.named_parameters()
            for place in self._names.find(name)
            if place.expert is None
        }
        changed = [n for n in self._tuned.names() if n not in adapted and self._has_changed(n)]
        for tensor in changed:
            parameter = parameters.get(tensor)
            if parameter is None or "." not in parameter:
                raise PackError(
                    f"'{tensor}' changed, and is no parameter that an adapter can carry by itself",
                    "Changes of experts that the model keeps in one tensor cannot be extracted yet;"
                    " release the fine-tune as a model.",
                )
            module = parameter.rpartition(".")[0]
            for name, other in parameters.items():
                if other.rpartition(".")[0] == module:
                    self._carry(other, name, read_float(self._tuned, name), new)

    def _has_changed(self, name: str) -> bool:
        if not self._tuned.spec(name).dtype.is_float:
            return False
        _, change, _ = self._change(name)
        self._kept += _squares(change)
        return bool(change.any())


def _squares(values: Array) -> float:
    return float(np.linalg.norm(values)) ** 2


def _task(config: Any) -> str | None:
    """PEFT's word for the model's task, read off the ending of its architecture's name."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for end, task in endings.items() if str(name).endswith(end)), None)
