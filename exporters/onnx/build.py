"""Which program makes the graph of a model."""

from __future__ import annotations

from typing import Any

import torch

from exporters.onnx.deferred import defer
from exporters.onnx.exported import export, kind_of
from exporters.onnx.genai import NotBuilt, build
from exporters.onnx.graph import Graph
from exporters.onnx.schemes import Route
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.parts import Parts

__all__ = ["GENAI", "build_graph"]

_ROPES = ("default", "llama3")
_HEAD = 16

GENAI = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "phi3", "ernie4_5",
})  # fmt: skip
"""Values of ``model_type`` for which the builder's graph was compared with transformers, with and
without a cache [tests/exporters/test_onnx.py]; others go through torch.onnx."""


def build_graph(checkpoint: Checkpoint, route: Route, half: bool) -> tuple[Graph, Parts]:
    """Make the graph of a model, without weights.

    Args:
        checkpoint: The model.
        route: Who makes it; ``auto`` takes onnxruntime-genai's builder for decoders that it is
            known to make right, torch.onnx for all others.
        half: Whether it computes in float16.

    Returns:
        The graph, and what reads the model's parameters.

    Raises:
        PackError: Neither can make it.
    """
    parts = Parts(checkpoint, torch.float32, "cpu")
    kind = kind_of(parts.model, checkpoint.label)
    config = checkpoint.config
    wanted = route == "genai" or (route == "auto" and _trusted(parts.model.config))
    if kind == "decoder" and wanted:
        defer(parts.model)
        try:
            return build(parts.model, config, half), parts
        except NotBuilt as error:
            if route == "genai":
                raise PackError(
                    f"{checkpoint.label}: onnxruntime-genai's builder cannot make it ({error})",
                    "Leave --graph out, or use --graph torch.",
                ) from None
            note = f"onnxruntime-genai's builder cannot make it ({error}); torch.onnx does"
        parts = Parts(checkpoint, torch.float32, "cpu")
        graph = export(parts.model, kind, half)
        return Graph(graph.model, graph.deferred, kind, graph.route, (note,)), parts
    if route == "genai":
        raise PackError(
            f"{checkpoint.label}: onnxruntime-genai's builder makes decoders only",
            "Leave --graph out.",
        )
    return export(parts.model, kind, half), parts


def _trusted(config: Any) -> bool:
    """Whether the builder is known to make a model right, by transformers' config of it."""
    if config.model_type not in GENAI:  # others may not even have these settings
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    windowed = getattr(config, "sliding_window", None) is not None
    return (
        # Its operator forgets the window where all layers have one.
        (config.model_type == "gemma2" or not windowed or _unused_window(config))
        and rope.get("rope_type", "default") in _ROPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and head % _HEAD == 0
        # It takes any layer with as many outputs as tokens for the head.
        and config.intermediate_size != config.vocab_size
    )


def _unused_window(config: Any) -> bool:
    return getattr(config, "use_sliding_window", True) is False
