"""Running a graph with onnxruntime, whole or in pieces that fit into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from exporters.onnx.graph import PAST, PRESENT, Cache, cache_of
from mergekit_lite.checkpoint.onnx import config_beside
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import FileFormatError, PackError

__all__ = ["Feed", "GraphRun", "Refused", "require_onnxruntime"]

_FOLDER = "session.model_external_initializers_file_folder_path"
_NUMPY = {
    onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT64: np.int64,
}  # fmt: skip


@dataclass(frozen=True)
class _Span:
    """Where a weight lies, and what it is.

    Attributes:
        file: Name of the file beside the graph.
        offset: Its first byte there.
        length: In bytes.
        kind: ONNX's number of its type.
    """

    file: str
    offset: int
    length: int
    kind: int


@dataclass(frozen=True)
class _Stage:
    """A part of a graph.

    Attributes:
        message: A graph of its own.
        inputs: What goes in.
        outputs: What comes out.
        spans: Where its weights lie, by name.
        measured: Inputs of which it needs the shape alone.
    """

    message: bytes
    inputs: Sequence[str]
    outputs: Sequence[str]
    spans: Mapping[str, _Span]
    measured: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Feed:
    """What goes in once.

    Attributes:
        values: Inputs by name.
        after: Which earlier feed the cache comes out of; None where `values` holds it.
        before: Tokens of that cache that are taken.
    """

    values: Mapping[str, Array]
    after: int | None = None
    before: int = 0


class Refused(PackError):
    """onnxruntime does not take a graph, or the graph is not the model."""


class GraphRun:
    """A graph that can be run.

    Args:
        path: Of the ``.onnx`` file; its weights lie beside it.
        budget: Bytes of weights that may be in memory; a larger graph is run in pieces, each of
            which is loaded when its turn comes.
        threads: Of onnxruntime.
        prepack: Whether a graph in pieces lays its weights out anew before it runs them. That pays
            for codes, and for floats only if a piece is run often.
        contents: Gives the content of weights beside the graph by their names, where they are not
            to be taken from files; asked once for each piece, in their order.
        model: The graph, where it is in no file.

    Attributes:
        inputs: Types and shapes by name; symbols are strings.
        outputs: Names.
        seconds: That running took, without loading.
        stages: Number of pieces.
        lent: Whether weights do not come from files.

    Raises:
        PackError: onnxruntime does not take it.
    """

    def __init__(
        self,
        path: Path,
        budget: int,
        threads: int,
        prepack: bool = True,
        contents: Callable[[Sequence[str]], Mapping[str, Array]] | None = None,
        model: Any = None,
    ) -> None:
        self._path = path
        self._prepack = prepack
        self._threads = threads
        self._contents = contents
        self.seconds = 0.0
        if model is None:
            try:
                model = onnx.load(path, load_external_data=False)
            except Exception as error:
                raise FileFormatError(
                    f"{path}: cannot be read as ONNX ({type(error).__name__})",
                    "Copy the file again.",
                ) from None
        self.inputs = {
            value.name: (_NUMPY.get(value.type.tensor_type.elem_type), _shape(value))
            for value in model.graph.input
        }
        self.outputs = [value.name for value in model.graph.output]
        self._stages = _cut(model, budget)
        if contents is not None:
            self._stages = [_lent(stage) for stage in self._stages]
        self.lent = contents is not None
        self._stated = _heads_of(path)
        self._sessions: dict[int, Any] = {}

    @property
    def stages(self) -> int:
        """Number of pieces."""
        return len(self._stages)

    @property
    def cache(self) -> Cache:
        """Shapes of the cache; of an encoder without layers."""
        return cache_of({name: shape for name, (_, shape) in self.inputs.items()}, self._stated)

    def feed(self, ids: Array, after: int | None = None, before: int = 0) -> Feed:
        """What a decoder is given for some tokens.

        Args:
            ids: ``(sequences, tokens)`` int64.
            after: Which of the feeds its cache comes out of; None for an empty one.
            before: Tokens of that cache that are taken.
        """
        values: dict[str, Array] = {"input_ids": ids}
        if after is None:
            for index, (heads, *sizes) in enumerate(self.cache.layers):
                for part, size in zip(("key", "value"), sizes, strict=True):
                    name = PAST.format(index, part)
                    values[name] = np.zeros((len(ids), heads, 0, size), self.inputs[name][0])
        mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
        values["attention_mask"] = mask
        values["position_ids"] = (mask.cumsum(1) - 1)[:, before:]
        return Feed(values, after, before)

    def run_all(self, feeds: Sequence[Feed]) -> list[dict[str, Array]]:
        """Run it several times; each piece of it is loaded once.

        Args:
            feeds: What goes in; inputs that the graph has not are left out.

        Returns:
            Outputs by name, of each.

        Raises:
            PackError: onnxruntime refuses.
        """
        held = [{n: v for n, v in feed.values.items() if n in self.inputs} for feed in feeds]
        later = [set(self.outputs)]
        for stage in reversed(self._stages[1:]):
            later.append(later[-1] | set(stage.inputs))
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._content, 0)
            for at, (stage, wanted) in enumerate(zip(self._stages, reversed(later), strict=True)):
                content = coming.result()
                coming = ahead.submit(self._content, at + 1)
                session = self._session(at)
                for feed, values in zip(feeds, held, strict=True):
                    given = {
                        name: self._shape_of(name, feed, values) if name in stage.measured
                        else self._value(name, feed, values, held)
                        for name in stage.inputs
                    }  # fmt: skip
                    began = time.perf_counter()
                    try:
                        found = _compute(session, stage, given, content)
                    except Exception as error:
                        raise _explained(self._path, error) from None
                    self.seconds += time.perf_counter() - began
                    values.update(zip(stage.outputs, found, strict=True))
                    for name in [name for name in values if name not in wanted]:
                        del values[name]
                del session, content
        return held

    def _shape_of(self, name: str, feed: Feed, values: Mapping[str, Array]) -> Array:
        """A cache that may not be there yet, for a part that only wants to know how long it is."""
        if name in values:
            return values[name]
        _, layer, part = name.split(".")
        heads, *sizes = self.cache.layers[int(layer)]
        shape = (len(feed.values["input_ids"]), heads, feed.before, sizes[part == "value"])
        return np.zeros(shape, self.inputs[name][0])

    @staticmethod
    def _value(name: str, feed: Feed, values: Mapping[str, Array], held: Any) -> Array:
        if name in values:
            return values[name]
        if feed.after is None or not name.startswith("past_key_values."):
            raise PackError(
                f"the graph has an input that is not filled here: '{name}'",
                "Graphs with input_ids, attention_mask, position_ids and a cache are run.",
            )
        _, layer, part = name.split(".")
        found: Array = held[feed.after][PRESENT.format(layer, part)]
        return found[:, :, : feed.before]

    def step(
        self, ids: Array, past: Mapping[str, Array] | None = None, mask: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Give tokens to a decoder.

        Args:
            ids: ``(sequences, tokens)`` int64.
            past: The cache that came out before; None for none.
            mask: ``(sequences, past + tokens)`` int64; None for all ones. Positions count its ones.

        Returns:
            Logits ``(sequences, tokens, vocabulary)`` float32, and the cache.
        """
        before = 0 if past is None else next(iter(past.values())).shape[2]
        values = {**self.feed(ids, None, before).values, **(past or {})}
        if mask is not None:
            values["attention_mask"] = mask
            values["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, before:]
        [found] = self.run_all([Feed(values)])
        cache = {
            PAST.format(index, part): found[PRESENT.format(index, part)]
            for index in range(len(self.cache.layers)) for part in ("key", "value")
        }  # fmt: skip
        return found["logits"].astype(np.float32), cache

    def _content(self, at: int) -> Mapping[str, Array]:
        """Content of a piece's weights that are not taken from files."""
        if self._contents is None or at >= len(self._stages):
            return {}
        return self._contents(list(self._stages[at].spans))

    def _session(self, at: int) -> Any:
        """The session of a piece; only a graph in one piece keeps it."""
        if at in self._sessions:
            return self._sessions[at]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4
        options.add_session_config_entry(_FOLDER, str(self._path.parent))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if len(self._stages) > 1 and not self._prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        stage = self._stages[at]
        try:
            made = onnxruntime.InferenceSession(
                stage.message, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise _explained(self._path, error) from None
        if len(self._stages) == 1:
            self._sessions[at] = made
        return made


def require_onnxruntime(what: str) -> None:
    """Refuse where onnxruntime or what makes graphs is not installed.

    Raises:
        PackError: Something is missing.
    """
    wanted = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    missing = next((name for name in wanted if find_spec(name) is None), None)
    if missing is not None:
        raise PackError(
            f"{what} needs '{missing}', which is not installed",
            "pip install 'pack-models[onnx]'",
        )


def _lent(stage: _Stage) -> _Stage:
    """A part whose weights come in like everything else: onnxruntime copies initializers."""
    piece = onnx.ModelProto.FromString(stage.message)
    weights = {t.name: t for t in piece.graph.initializer if t.name in stage.spans}
    kept = [tensor for tensor in piece.graph.initializer if tensor.name not in weights]
    del piece.graph.initializer[:]
    piece.graph.initializer.extend(kept)
    piece.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in weights.items()
    )
    return replace(stage, message=piece.SerializeToString())


def _compute(
    session: Any, stage: _Stage, given: Mapping[str, Array], content: Mapping[str, Array]
) -> list[Array]:
    """Run a part; `content` are weights that it gets without a copy."""
    if not content:
        found: list[Array] = session.run(list(stage.outputs), dict(given))
        return found
    from onnxruntime import OrtValue

    values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
    for name, array in content.items():
        kind = stage.spans[name].kind
        values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
    return [out.numpy() for out in session.run_with_ort_values(list(stage.outputs), values)]


def _heads_of(path: Path) -> tuple[int | None, int | None]:
    """Number and size of heads by the config beside a graph, which may leave them open."""
    for folder in (path.parent, path.parent.parent):
        config = config_beside(folder)
        if config:
            keys = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
            attention, heads, size, hidden = (
                found if isinstance(found := config.get(key), int) and found > 0 else None
                for key in keys
            )
            if size is None and attention and hidden:
                size = hidden // attention
            return heads or attention, size
    return None, None


def _explained(path: Path, error: Exception) -> PackError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Refused(
        f"{path}: onnxruntime refuses it: {lines[0][:300]}",
        "Export it again (--graph torch makes another graph), or copy it again with the files "
        "beside it; its operators may also be newer than this onnxruntime.",
    )


def _shape(value: Any) -> tuple[int | str | None, ...]:
    return tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
        for d in value.type.tensor_type.shape.dim
    )


def _span(tensor: Any) -> _Span | None:
    """Where an initializer beside the graph lies; None for one inside it."""
    stated = {entry.key: entry.value for entry in tensor.external_data}
    if "location" not in stated:
        return None
    numbers = stated.get("offset", "0"), stated.get("length", "0")
    if not all(number.isdecimal() for number in numbers):
        raise FileFormatError(
            f"'{tensor.name}' has an offset that is no number",
            "Export it again, or copy it again with the files beside it.",
        )
    return _Span(stated["location"], int(numbers[0]), int(numbers[1]), tensor.data_type)


def _spans(graph: Any) -> dict[str, _Span]:
    return {tensor.name: span for tensor in graph.initializer if (span := _span(tensor))}


def _size(tensor: Any) -> int:
    span = _span(tensor)
    return int(tensor.ByteSize()) if span is None else span.length


def _cut(model: Any, budget: int) -> list[_Stage]:
    """Cut a graph where so many bytes of weights are together."""
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    sizes = {name: _size(tensor) for name, tensor in initializers.items()}
    if sum(sizes.values()) <= budget:
        inputs = [value.name for value in graph.input]
        outputs = [value.name for value in graph.output]
        return [_Stage(model.SerializeToString(), inputs, outputs, _spans(graph))]
    groups: list[list[Any]] = [[]]
    held: set[str] = set()
    total = 0
    for node in graph.node:
        new = {name for name in node.input if name in sizes} - held
        more = sum(sizes[name] for name in new)
        if groups[-1] and total + more > budget:
            groups.append([])
            held, total = set(), 0
            new = {name for name in node.input if name in sizes}
            more = sum(sizes[name] for name in new)
        groups[-1].append(node)
        held |= new
        total += more
    return _stages(model, groups, initializers)


def _stages(model: Any, groups: Sequence[Sequence[Any]], initializers: Any) -> list[_Stage]:
    graph = model.graph
    types = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    used = [{n for node in group for n in node.input if n} for group in groups]
    made = [{n for node in group for n in node.output if n} for group in groups]
    outside = {value.name for value in graph.output}
    found = []
    for at, group in enumerate(groups):
        inputs = sorted(used[at] - made[at] - set(initializers))
        after = set().union(*used[at + 1 :], outside)
        outputs = sorted(made[at] & after)
        piece = onnx.ModelProto()
        piece.CopyFrom(model)
        piece.graph.Clear()
        piece.graph.name = f"stage {at}"
        piece.graph.node.extend(group)
        piece.graph.initializer.extend(
            initializers[name] for name in sorted(used[at] & set(initializers))
        )
        for names, target in ((inputs, piece.graph.input), (outputs, piece.graph.output)):
            for name in names:
                value = onnx.ValueInfoProto()
                value.name = name
                kind = types[name].type.tensor_type.elem_type if name in types else 0
                if kind == 0:
                    raise PackError(
                        f"the graph does not state the type of '{name}'", "Report this, please."
                    )
                value.type.tensor_type.elem_type = kind
                target.append(value)
        spans = _spans(piece.graph)
        measured = {name for name in inputs if name.startswith("past_key_values.")}
        measured -= {name for node in group if node.op_type != "Shape" for name in node.input}
        stage = _Stage(piece.SerializeToString(), inputs, outputs, spans, frozenset(measured))
        found.append(stage)
    return found
