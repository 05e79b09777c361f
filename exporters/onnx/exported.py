"""Graphs by torch.onnx: any decoder or encoder of transformers that torch can trace.

Parameters are traced as tensors of one element that only claim their shape, so that nothing of the
model is in memory; afterwards their initializers are tied to the checkpoint's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch

from exporters.onnx.deferred import Deferred
from exporters.onnx.experts import EXPERTS, interleaved, register_experts
from exporters.onnx.graph import OPSET, PAST, PRESENT, Graph, Kind, leave_unset
from mergekit_lite.adapters.architecture import quiet
from mergekit_lite.adapters.lending import replace_parameters
from mergekit_lite.errors import PackError

__all__ = ["export", "kind_of"]

_CACHED = {"full_attention", "sliding_attention", "chunked_attention"}
_LOST = ("pooler_output", "hidden_states", "attentions", "past_key_values", "loss")
_BATCH, _TOKENS, _PAST = 2, 3, 5
"""Sizes that the model is traced with; all of them may change afterwards."""


def kind_of(model: Any, label: str) -> Kind:
    """Whether a model is a decoder or an encoder.

    Raises:
        PackError: It is neither; it works on something else than text, or keeps another state.
    """
    config = model.config
    name = type(model).__name__

    def refuse(why: str) -> PackError:
        return PackError(
            f"{label}: a {name} {why}, which is not exported to ONNX here",
            "Decoders with a cache of keys and values, and encoders of text, are.",
        )

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("has an encoder and a decoder")
    if model.main_input_name != "input_ids" or getattr(config, "vision_config", None) is not None:
        raise refuse("takes more than text")
    if model.get_output_embeddings() is None or not model.can_generate():
        return "encoder"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _CACHED)
    if other:
        raise refuse(f"has layers of '{other[0]}'")
    if getattr(model, "_is_stateful", False) or not _cached(model):
        raise refuse("keeps a state that is no cache of keys and values")
    return "decoder"


def _cached(model: Any) -> bool:
    return "past_key_values" in signature(model.forward).parameters


def export(model: Any, kind: Kind, half: bool) -> Graph:
    """Trace a model.

    Args:
        model: transformers' model on the meta device; its parameters are replaced.
        kind: Of the model.
        half: Whether it computes in float16.

    Raises:
        PackError: torch cannot trace it, or has no operator for something in it.
    """
    dtype = torch.float16 if half else torch.float32
    paths = _claim(model, dtype)
    register_experts()
    _plain_attention(model)
    try:
        with quiet(), _silent(), torch.no_grad():
            traced = _decoder(model, dtype) if kind == "decoder" else _encoder(model)
            program = torch.export.export(
                traced.module, traced.arguments, dynamic_shapes=traced.dynamic, strict=False
            )
            made = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
                input_names=traced.inputs, output_names=traced.outputs,
            )  # fmt: skip
    except PackError:
        raise
    except Exception as error:
        inner = error
        while inner.__cause__ is not None:  # torch tells the cause last
            inner = inner.__cause__  # type: ignore[assignment]
        what = re.sub(r"\x1b\[[0-9;]*m", "", str(inner)).strip().splitlines()
        raise PackError(
            f"a {type(model).__name__} cannot be exported by torch {torch.__version__}: "
            f"{type(inner).__name__}: {what[0][:160] if what else ''}",
            "This architecture is not exported to ONNX here; --to gguf may know it.",
        ) from None
    deferred = _tie(made.model, paths)
    _turn_experts(made.model, deferred)
    _tidy(made.model, deferred)
    _name_dimensions(made.model, kind)
    return Graph(made.model, deferred, kind, f"torch.onnx {torch.__version__.partition('+')[0]}")


class _Traced:
    """What is traced: a module, arguments, and their names."""

    def __init__(
        self, module: Any, arguments: tuple[Any, ...], dynamic: Any, inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> None:  # fmt: skip
        self.module = module
        self.arguments = arguments
        self.dynamic = dynamic
        self.inputs = list(inputs)
        self.outputs = list(outputs)


class _Decoder(torch.nn.Module):  # type: ignore[misc]
    """A decoder whose cache goes in and comes out as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any
    ) -> tuple[Any, ...]:
        """Logits, then keys and values of every layer."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(past):
            cache.update(keys, values, index)
        given: dict[str, Any] = {}
        if "position_ids" in signature(self.model.forward).parameters:
            given["position_ids"] = position_ids
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache,
            use_cache=True, **given,
        )  # fmt: skip
        layers = found.past_key_values.layers
        return (found.logits, *(part for layer in layers for part in (layer.keys, layer.values)))


class _Encoder(torch.nn.Module):  # type: ignore[misc]
    """An encoder that gives the named tensors of its result."""

    def __init__(self, model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *arguments: Any) -> tuple[Any, ...]:
        """What is wanted of its result."""
        found = self.model(**dict(zip(self.inputs, arguments, strict=True)))
        return tuple(found[name] for name in self.outputs)


def _decoder(model: Any, dtype: Any) -> _Traced:
    layers = _cache_shapes(model)
    past = [
        tuple(torch.zeros(_BATCH, heads, _PAST, size, dtype=dtype) for size in sizes)
        for heads, *sizes in layers
    ]
    ids = torch.ones(_BATCH, _TOKENS, dtype=torch.int64)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    positions = torch.arange(_PAST, _PAST + _TOKENS).expand(_BATCH, _TOKENS).clone()
    free = torch.export.Dim.DYNAMIC
    both = {0: free, 1: free}
    kept = ({0: free, 2: free}, {0: free, 2: free})
    names = [(index, part) for index in range(len(layers)) for part in ("key", "value")]
    return _Traced(
        _Decoder(model),
        (ids, mask, positions, past),
        (both, both, both, [kept] * len(layers)),
        ["input_ids", "attention_mask", "position_ids", *(PAST.format(*name) for name in names)],
        ["logits", *(PRESENT.format(*name) for name in names)],
    )


def _cache_shapes(model: Any) -> list[tuple[int, int, int]]:
    """Heads, size of keys and size of values, by layer: what a run without values shows."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        found = model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=True)
    layers = getattr(found.past_key_values, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise PackError(
            f"a {type(model).__name__} keeps a state that is no cache of keys and values",
            "Decoders with such a cache, and encoders of text, are exported to ONNX.",
        )
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


def _encoder(model: Any) -> _Traced:
    from torch._subclasses.fake_tensor import FakeTensorMode

    known = signature(model.forward).parameters
    inputs = ["input_ids", "attention_mask"]
    if "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    given = {name: torch.ones(_BATCH, _TOKENS, dtype=torch.int64) for name in inputs}
    if "token_type_ids" in given:
        given["token_type_ids"] = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = model(**{n: torch.ones(_BATCH, _TOKENS, dtype=torch.int64) for n in inputs})
    outputs = [
        name for name, value in found.items()
        if isinstance(value, torch.Tensor) and name not in _LOST
    ]  # fmt: skip
    free = torch.export.Dim.DYNAMIC
    return _Traced(
        _Encoder(model, inputs, outputs),
        tuple(given.values()),
        (tuple({0: free, 1: free} for _ in inputs),),
        inputs,
        outputs,
    )


def _claim(model: Any, dtype: Any) -> dict[str, str]:
    """Give a model parameters, and buffers that files hold, that only claim their shape.

    Returns:
        By each path the first that the same parameter has.
    """

    def one(tensor: Any, _: str = "") -> Any:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.zeros((), dtype=kind).expand(tensor.shape)

    shared = replace_parameters(model, one).paths.values()
    paths = {path: every[0] for every in shared for path in every}
    for path, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):  # noqa: SLF001
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = one(buffer)  # noqa: SLF001
                full = f"{path}.{name}".lstrip(".")
                paths[full] = full
    return paths


def _plain_attention(model: Any) -> None:
    """Choose attention and experts that can be traced."""
    for config in (model.config, *(m.config for m in model.modules() if hasattr(m, "config"))):
        config._attn_implementation = (  # noqa: SLF001
            "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        )
        config._experts_implementation = EXPERTS  # noqa: SLF001


def _tie(model: Any, paths: Mapping[str, str]) -> dict[str, Deferred]:
    """Give initializers that are parameters the names of parameters, and no values."""
    found: dict[str, Deferred] = {}
    for name, value in list(model.graph.initializers.items()):
        path = name.removeprefix("model.")
        if path not in paths or name == path:
            continue
        first = paths[path]
        del model.graph.initializers[name]
        if first in found:
            value.replace_all_uses_with(model.graph.initializers[first])
            continue
        shape = [int(size) for size in value.shape]
        found[first] = Deferred(torch.empty(shape, dtype=torch.float32, device="meta"), first)
        value.name = first
        leave_unset(value)
        model.graph.initializers[first] = value
    return found


def _turn_experts(model: Any, deferred: dict[str, Deferred]) -> None:
    """Lay out the matrices of experts as their operator has them."""
    for node in model.graph:
        if node.op_type == "MoE" and (name := node.inputs[2].name) in deferred:
            deferred[name] = interleaved(deferred[name])


def _tidy(model: Any, deferred: Mapping[str, Deferred]) -> None:
    """Fold constants and drop what is not needed; deferred weights count as unknown."""
    import onnxscript.optimizer

    graph = model.graph
    kept = {}
    for name in deferred:
        value = graph.initializers.pop(name)
        kept[name] = value, value.const_value
        value.const_value = None
        graph.inputs.append(value)
    with contextlib.redirect_stdout(io.StringIO()), _silent():
        onnxscript.optimizer.optimize_ir(model)
    for name, (value, constant) in kept.items():
        graph.inputs.remove(value)
        value.const_value = constant
        if value.uses():
            graph.initializers[name] = value
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.doc_string = graph.doc_string = None
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for out in node.outputs:
            out.metadata_props.clear()


def _name_dimensions(model: Any, kind: Kind) -> None:
    """Call dimensions of inputs and outputs what they are; inside, forget those with symbols."""
    import onnx_ir

    names = {"attention_mask": {0: "batch_size", 1: "total_sequence_length"}}
    cache = {0: "batch_size", 2: "past_sequence_length"}
    grown = {0: "batch_size", 2: "total_sequence_length"}
    usual = {0: "batch_size", 1: "sequence_length"}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
        called = names.get(value.name or "", usual) if kind == "decoder" else usual
        if (value.name or "").startswith("past_key_values"):
            called = cache
        elif (value.name or "").startswith("present"):
            called = grown
        value.shape = onnx_ir.Shape(
            [d if isinstance(d, int) else called.get(at) for at, d in enumerate(value.shape)]
        )
    fixed = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        for out in node.outputs:
            if id(out) not in fixed and out.shape is not None and not out.shape.is_static():
                out.shape = None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what exporters log from the user's terminal."""
    names = ("torch.onnx", "torch.export", "torch._subclasses.fake_tensor", "onnxscript",
             "onnx_ir", "torch.onnx._internal.exporter._registration")  # fmt: skip
    kept = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in kept.items():
            logging.getLogger(name).setLevel(level)
