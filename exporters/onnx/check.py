"""A graph compared with the model that it was made of, before it gets its name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from exporters.onnx.deferred import Read
from exporters.onnx.graph import Graph, Kind, leave_unset
from exporters.onnx.session import Feed, GraphRun, Refused
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import LayerwiseModel
from mergekit_lite.evaluate.parts import Parts
from mergekit_lite.merge.run import Progress

__all__ = ["TOLERANCE", "Checked", "Comparison", "check_form", "float_run", "refuse_other"]

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 1e-1}
"""Largest difference of a logit, over the largest logit, with which a graph of floats is right."""
_SIZES = ((1, 20, 14), (2, 12, 11))
"""Sequences, tokens, and how many of them are in the cache where one is used."""
_SEED = 20


@dataclass(frozen=True)
class Checked:
    """How far a graph is from its model.

    Attributes:
        difference: Largest difference of an output.
        largest: Largest magnitude of the model's.
        cached: The same difference where the last tokens came in with a cache; None of encoders.
        agreement: Share of positions with the same largest output.
        tokens: Positions that were compared.
        tokens_per_second: Of onnxruntime, over all that was run.
    """

    difference: float
    largest: float
    cached: float | None
    agreement: float
    tokens: int
    tokens_per_second: float

    def describe(self) -> dict[str, Any]:
        """As data, to the digits that do not depend on a machine; no times."""
        found: dict[str, Any] = {
            "largest_difference": _short(self.difference),
            "largest_output": _short(self.largest),
            "agreement": _short(self.agreement),
            "tokens": self.tokens,
        }
        if self.cached is not None:
            found["largest_difference_cached"] = _short(self.cached)
        return found

    def line(self) -> str:
        """For people."""
        cached = "" if self.cached is None else f" ({self.cached:.2g} with a cache)"
        return (
            f"onnxruntime against the model: largest difference {self.difference:.2g}{cached}, of "
            f"{self.largest:.3g}; same first choice at {100 * self.agreement:.1f} % of "
            f"{self.tokens} tokens; {self.tokens_per_second:.0f} tokens/s"
        )


def _ran(cached: bool) -> int:
    """Tokens that go in."""
    return sum(rows * (tokens + (tokens - first) * cached) for rows, tokens, first in _SIZES)


def _short(number: float) -> float:
    return float(f"{number:.2g}")


def check_form(path: Path, linked: Collection[str] = ()) -> None:
    """Let ONNX's own checker look at a file, types and shapes included.

    Args:
        path: Of the file.
        linked: Names of files beside it that have other names too. The checker refuses such, so
            it is shown empty ones of the same size.

    Raises:
        PackError: It finds a mistake.
    """
    if not linked:
        _check_model(path)
        return
    with tempfile.TemporaryDirectory(prefix="pack-") as name:
        shown = Path(name)
        shutil.copy(path, shown)
        for file in path.parent.iterdir():
            if file != path:
                with (shown / file.name).open("wb") as empty:
                    empty.truncate(file.stat().st_size)
        _check_model(shown / path.name)


def _check_model(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PackError(
            f"{path.name}: ONNX's checker refuses the graph: {first[:300]}",
            "Try the other way of exporting: --graph torch, or --graph genai.",
        ) from None


class Comparison:
    """A model on some tokens, for graphs to be compared with.

    Args:
        checkpoint: The model, which is run when it is first compared.
        kind: Of the model.
        progress: Told how far it is.
    """

    def __init__(self, checkpoint: Checkpoint, kind: Kind, progress: Progress) -> None:
        made = np.random.Generator(np.random.PCG64(_SEED))
        stated = checkpoint.config.get("vocab_size")
        size = stated if isinstance(stated, int) and stated > 0 else 1
        self._checkpoint = checkpoint
        self._kind = kind
        self._progress = progress
        self._batches = [
            made.integers(min(3, size - 1), size, (rows, tokens)) for rows, tokens, _ in _SIZES
        ]
        self._expected: list[Array] | None = None

    def measure(self, run: GraphRun) -> Checked:
        """How far a graph is from the model."""
        import torch

        tensors = [torch.from_numpy(batch) for batch in self._batches]
        cached = None
        if self._kind == "decoder":
            if self._expected is None:
                self._expected = _decoded(self._checkpoint, tensors, self._progress)
            found, cached = _run_decoder(run, self._batches)
        else:
            if self._expected is None:
                self._expected = _encoded(self._checkpoint, run, tensors)
            found = _run_encoder(run, self._batches)
        pairs = list(zip(self._expected, found, strict=True))
        with_cache = None
        if cached is not None:
            with_cache = max(
                float(np.abs(e[:, first:] - f).max())
                for e, f, (_, _, first) in zip(self._expected, cached, _SIZES, strict=True)
            )
        same = [(e.argmax(-1) == f.argmax(-1)).reshape(-1) for e, f in pairs]
        return Checked(
            max(float(np.abs(e - f).max()) for e, f in pairs),
            max(float(np.abs(e).max()) for e in self._expected),
            with_cache,
            float(np.concatenate(same).mean()),
            sum(batch.size for batch in self._batches),
            _ran(cached is not None) / max(run.seconds, 1e-9),
        )


def refuse_other(checked: Checked, limit: float | None, route: str) -> None:
    """Refuse a graph that is not the model.

    Args:
        checked: How far it is from the model.
        limit: Largest difference over the largest output; None where only numbers are wanted.
        route: What made the graph.

    Raises:
        Refused: It is another model.
    """
    worst = max(checked.difference, checked.cached or 0.0)
    if not np.isfinite(worst) or (limit is not None and worst > limit * max(1.0, checked.largest)):
        cached = "" if checked.cached is None else f" ({checked.cached:.2g} with a cache)"
        raise Refused(
            f"the graph by {route} is not the model: outputs differ by {checked.difference:.2g}"
            f"{cached}, the largest is {checked.largest:.3g}",
            "Try the other way of exporting: --graph torch, or --graph genai.",
        )


def float_run(graph: Graph, read: Read, threads: int, budget: int) -> GraphRun:
    """What runs a graph of floats whose weights are in no file: they are read when they are needed.

    Args:
        graph: Its weights have no content; left as it is.
        read: Gives the values of parameters.
        threads: Of onnxruntime.
        budget: Bytes of weights in memory.
    """
    import onnx_ir

    initializers = graph.model.graph.initializers
    for name in graph.deferred:
        if name in initializers:
            value = initializers[name]
            length = value.const_value.nbytes
            value.const_value = onnx_ir.ExternalTensor(
                "deferred", 0, length, value.dtype, shape=value.shape, name=name
            )
    message = onnx_ir.to_proto(graph.model)
    for name in graph.deferred:
        if name in initializers:
            leave_unset(initializers[name])

    def values(name: str) -> Array:
        kind = np.float16 if initializers[name].dtype.name == "FLOAT16" else np.float32
        found: Array = graph.deferred[name].read(read).contiguous().numpy()
        return found.astype(kind, copy=False) if found.dtype.kind == "f" else found

    return GraphRun(Path(), budget, threads, False, values, message)


def _decoded(checkpoint: Checkpoint, batches: Sequence[Any], progress: Progress) -> list[Array]:
    model = LayerwiseModel(checkpoint)
    kept = model.hidden(batches, progress)
    try:
        return [np.asarray(logits.numpy()) for logits in model.logits(batches, kept)]
    finally:
        kept.close()


def _encoded(checkpoint: Checkpoint, run: GraphRun, batches: Sequence[Any]) -> list[Array]:
    """Outputs of a model that is run whole, side by side."""
    import torch

    parts = Parts(checkpoint, torch.float32, "cpu")
    wanted = frozenset(_used(parts.model, run.outputs))
    for path, module in parts.model.named_modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001
            full = f"{path}.{name}".lstrip(".")
            if parameter is not None and full in wanted:
                value = parts.parameter(full)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)  # noqa: SLF001
    if hasattr(parts.model, "pooler") and "pooler_output" not in run.outputs:
        parts.model.pooler = None
    found = []
    with torch.inference_mode():
        for batch in batches:
            given = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
            result = parts.model(**given)
            found.append(_joined([result[name].numpy() for name in run.outputs], len(batch)))
    return found


def _used(model: Any, outputs: Sequence[str]) -> list[str]:
    """Parameters that these outputs need; a pooler's may be absent."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if "pooler_output" in outputs or not hasattr(model, "pooler"):
        return names
    return [name for name in names if not name.startswith("pooler.")]


def _joined(arrays: Sequence[Array], rows: int) -> Array:
    return np.concatenate([array.reshape(rows, -1) for array in arrays], axis=1)


def _run_encoder(run: GraphRun, batches: Sequence[Array]) -> list[Array]:
    feeds = [
        Feed({
            "input_ids": batch, "attention_mask": np.ones_like(batch),
            "token_type_ids": np.zeros_like(batch),
        })
        for batch in batches
    ]  # fmt: skip
    return [
        _joined([found[name].astype(np.float32) for name in run.outputs], len(batch))
        for batch, found in zip(batches, run.run_all(feeds), strict=True)
    ]


def _run_decoder(run: GraphRun, batches: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Logits of all tokens at once; and of the last ones with a cache of the first."""
    feeds: list[Feed] = []
    for batch, (_, _, first) in zip(batches, _SIZES, strict=True):
        feeds.append(run.feed(batch))
        feeds.append(run.feed(batch[:, first:], len(feeds) - 1, first))
    found = [one["logits"].astype(np.float32) for one in run.run_all(feeds)]
    return found[::2], found[1::2]
