"""A graph compared with the model that it was made of, before it gets its name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx

from exporters.onnx.graph import Graph, Kind, leave_unset
from exporters.onnx.session import Feed, GraphRun, Refused
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import LayerwiseModel
from mergekit_lite.evaluate.parts import Parts
from mergekit_lite.merge.run import Progress

__all__ = [
    "TOLERANCE",
    "Checked",
    "Comparison",
    "as_floats",
    "check_form",
    "check_places",
    "refuse_other",
]

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
        busy: Whether weights were made and written at the same time.
    """

    difference: float
    largest: float
    cached: float | None
    agreement: float
    tokens: int
    tokens_per_second: float
    busy: bool = False

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
            f"{' while the weights were written' if self.busy else ''}"
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


def check_places(path: Path, ends: Mapping[str, tuple[bytes, bytes]]) -> None:
    """Look whether weights lie where a file says that they lie.

    Args:
        path: Of the graph.
        ends: First and last bytes of weights, by name.

    Raises:
        PackError: One lies elsewhere.
        OSError: A file of weights cannot be read.
    """
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name not in ends or not tensor.external_data:
            continue
        stated = {entry.key: entry.value for entry in tensor.external_data}
        first, last = ends[tensor.name]
        offset = int(stated["offset"])
        with (path.parent / stated["location"]).open("rb") as file:
            found = [_bytes_at(file, offset, len(first))]
            found.append(_bytes_at(file, offset + int(stated["length"]) - len(last), len(last)))
        if found != [first, last]:
            raise PackError(
                f"{path.name}: '{tensor.name}' does not lie where the graph says",
                "Run the same command again; if that does not help, report this, please.",
            )


def _bytes_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


class Comparison:
    """A model on some tokens, for graphs to be compared with.

    The model is run beside whatever else goes on, as soon as `begin` is called.

    Args:
        checkpoint: The model.
        kind: Of the model.
    """

    def __init__(self, checkpoint: Checkpoint, kind: Kind) -> None:
        made = np.random.Generator(np.random.PCG64(_SEED))
        stated = checkpoint.config.get("vocab_size")
        size = stated if isinstance(stated, int) and stated > 0 else 1
        self._checkpoint = checkpoint
        self._kind = kind
        self._batches = [
            made.integers(min(3, size - 1), size, (rows, tokens)) for rows, tokens, _ in _SIZES
        ]
        self._stop = _Stop()
        self._beside = ThreadPoolExecutor(1)
        self._coming: Future[list[Array]] | None = None

    def begin(self, outputs: Sequence[str]) -> None:
        """Begin to run the model.

        Args:
            outputs: Names of what is compared, of an encoder.

        Raises:
            PackError: The model cannot be run.
        """
        import torch

        if self._coming is not None:
            return
        tensors = [torch.from_numpy(batch) for batch in self._batches]
        if self._kind == "decoder":
            model = LayerwiseModel(self._checkpoint)
            self._coming = self._beside.submit(_decoded, model, tensors, self._stop)
        else:
            self._coming = self._beside.submit(_encoded, self._checkpoint, outputs, tensors)

    def close(self) -> None:
        """Let it end, at the next layer if it is running."""
        self._stop.set()
        self._beside.shutdown(cancel_futures=True)

    def measure(self, run: GraphRun) -> Checked:
        """How far a graph is from the model.

        Raises:
            PackError: The model, or the graph, cannot be run.
        """
        self.begin(run.outputs)
        cached = None
        if self._kind == "decoder":
            found, cached = _run_decoder(run, self._batches)
        else:
            found = _run_encoder(run, self._batches)
        assert self._coming is not None  # noqa: S101 (it was begun above)
        expected = self._coming.result()
        pairs = list(zip(expected, found, strict=True))
        with_cache = None
        if cached is not None:
            with_cache = max(
                float(np.abs(e[:, first:] - f).max())
                for e, f, (_, _, first) in zip(expected, cached, _SIZES, strict=True)
            )
        same = [(e.argmax(-1) == f.argmax(-1)).reshape(-1) for e, f in pairs]
        return Checked(
            max(float(np.abs(e - f).max()) for e, f in pairs),
            max(float(np.abs(e).max()) for e in expected),
            with_cache,
            float(np.concatenate(same).mean()),
            sum(batch.size for batch in self._batches),
            _ran(cached is not None) / max(run.seconds, 1e-9),
            run.lent,
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


def as_floats(graph: Graph) -> Any:
    """The message of a graph before it is rewritten, whose weights are in no file.

    Args:
        graph: Its weights have no content; left as it is.
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
    return message


class _Stopped(Exception):
    """Nobody wants the model's outputs any more."""


class _Stop(Progress):
    """Ends a run of a model early; shows nothing, since something else is shown meanwhile."""

    def __init__(self) -> None:
        self._asked = False

    def set(self) -> None:
        """End it."""
        self._asked = True

    def advance(self, count: int) -> None:
        """After each layer."""
        del count
        if self._asked:
            raise _Stopped


def _decoded(model: LayerwiseModel, batches: Sequence[Any], stop: Progress) -> list[Array]:
    kept = model.hidden(batches, stop)
    try:
        return [np.asarray(logits.numpy()) for logits in model.logits(batches, kept)]
    finally:
        kept.close()


def _encoded(checkpoint: Checkpoint, outputs: Sequence[str], batches: Sequence[Any]) -> list[Array]:
    """Outputs of a model that is run whole, side by side."""
    import torch

    parts = Parts(checkpoint, torch.float32, "cpu")
    wanted = frozenset(_used(parts.model, outputs))
    for path, module in parts.model.named_modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001
            full = f"{path}.{name}".lstrip(".")
            if parameter is not None and full in wanted:
                value = parts.parameter(full)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)  # noqa: SLF001
    if hasattr(parts.model, "pooler") and "pooler_output" not in outputs:
        parts.model.pooler = None
    found = []
    with torch.inference_mode():
        for batch in batches:
            given = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
            result = parts.model(**given)
            found.append(_joined([result[name].numpy() for name in outputs], len(batch)))
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
