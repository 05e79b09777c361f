"""Graphs by onnxruntime-genai's builder: decoders of families that it knows.

The builder chooses a class for the architecture, walks over transformers' modules and emits nodes.
It is given a model whose weights are deferred, and what it would save is taken from it, so neither
the weights nor a second copy of them is ever in memory.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporters.onnx.deferred import Deferred
from exporters.onnx.graph import OPSET, PAST, PRESENT, Graph, leave_unset
from mergekit_lite.adapters.architecture import quiet
from mergekit_lite.errors import PackError
from mergekit_lite.merge.config import to_json

__all__ = ["NotBuilt", "build"]


class NotBuilt(Exception):
    """The builder cannot make this model; the message says why."""


def build(model: Any, config: Mapping[str, Any], half: bool) -> Graph:
    """Build the graph of a decoder.

    Args:
        model: transformers' model with deferred parameters.
        config: Its config.json.
        half: Whether it computes in float16.

    Raises:
        NotBuilt: The builder does not know it, or fails on it.
    """
    import onnxruntime_genai
    from onnxruntime_genai.models import builder

    taken: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="pack-") as name, _taking(model, taken) as deferred:
        folder = Path(name)
        (folder / "config.json").write_bytes(to_json(dict(config)))
        precision = "fp16" if half else "fp32"
        # Its float16 attention for the CPU is an older operator; that of webgpu runs there too.
        provider = "webgpu" if half else "cpu"
        try:
            with quiet(), contextlib.redirect_stdout(io.StringIO()):
                options = {
                    "hf_details": {
                        "extra_kwargs": {}, "hf_name": name, "hf_config": _config(config, name),
                    },
                    "windowed_kv_cache": False,
                    "shared_embeddings": bool(getattr(model.config, "tie_word_embeddings", False)),
                }  # fmt: skip
                builder.create_model(
                    "", name, name, precision, provider, f"{name}/cache", **options
                )
        except _Taken:
            pass
        except PackError:
            raise
        except Exception as error:
            raise NotBuilt(f"{type(error).__name__}: {error}") from None
    [ir_model] = taken
    _name_shapes(ir_model, model)
    _standard_norms(ir_model)
    return Graph(
        ir_model, deferred, "decoder", f"onnxruntime-genai {onnxruntime_genai.__version__}"
    )


def _config(config: Mapping[str, Any], folder: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    found._name_or_path = folder  # noqa: SLF001 (where the builder looks for small files)
    return found


class _Taken(Exception):
    """The graph is there; nothing that the builder would do after that is wanted."""


@contextlib.contextmanager
def _taking(model: Any, taken: list[Any]) -> Iterator[dict[str, Deferred]]:
    """Let the builder use a model of ours, and take the graph that it would save."""
    import onnx_ir
    from onnxruntime_genai.models import builder  # noqa: F401 (makes its own modules importable)
    from builders import base  # isort: skip

    deferred: dict[str, Deferred] = {}
    usual = base.Model.make_initializer

    def make_initializer(
        self: Any, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False
    ) -> None:
        if not isinstance(tensor, Deferred):
            usual(self, tensor, name, to=to, raw=raw)
            return
        deferred[name] = tensor
        kind = onnx_ir.DataType.FLOAT if to is None else to
        value = self.make_value(name, kind, list(tensor.shape))
        leave_unset(value)
        self.model.graph.register_initializer(value)

    def save_model(self: Any, folder: str) -> None:
        self.model.graph.sort()
        taken.append(self.model)
        raise _Taken

    replaced = {
        "make_initializer": make_initializer,
        "load_weights": lambda self, path: model,
        "save_model": save_model,
    }
    kept = {name: getattr(base.Model, name) for name in replaced}
    for name, function in replaced.items():
        setattr(base.Model, name, function)
    try:
        yield deferred
    finally:
        for name, function in kept.items():
            setattr(base.Model, name, function)


def _standard_norms(ir_model: Any) -> None:
    """Use ONNX's own operator where the builder takes an older one of onnxruntime.

    They mean the same, and no checker knows the older one.
    """
    ir_model.graph.opset_imports[""] = OPSET
    outputs = {id(value) for value in ir_model.graph.outputs}
    for node in ir_model.graph:
        for out in node.outputs:
            if id(out) not in outputs:
                out.shape = None  # some of its shapes of constants are wrong
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type, node.domain = "RMSNormalization", ""


def _name_shapes(ir_model: Any, model: Any) -> None:
    """State the size of heads, which the builder leaves open."""
    import onnx_ir

    size = getattr(model.config, "head_dim", None)
    if size is None:
        size = model.config.hidden_size // model.config.num_attention_heads
    graph = ir_model.graph
    known = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    at = 0
    while PAST.format(at, "key") in known:
        for names in (PAST, PRESENT):
            for part in ("key", "value"):
                value = known[names.format(at, part)]
                value.shape = onnx_ir.Shape([*list(value.shape)[:3], size])
        at += 1
