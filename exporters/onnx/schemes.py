"""Kinds of ONNX files; imports nothing large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_lite.errors import PackError, nearest

__all__ = ["BLOCKS", "ROUTES", "SCHEMES", "OnnxScheme", "Route", "find_scheme"]

Route = Literal["auto", "genai", "torch"]
ROUTES: tuple[Route, ...] = ("auto", "genai", "torch")
"""Who makes a graph: onnxruntime-genai's builder, torch.onnx, or the better one for the model."""

BLOCKS = (32, 128)
"""Weights that share a scale, of int4."""


@dataclass(frozen=True)
class OnnxScheme:
    """What is stored and computed.

    Attributes:
        name: As the user writes it.
        file: Name of the file without ``.onnx``; what transformers.js looks for by its ``dtype``.
        dtype: That the graph computes in: ``float32`` or ``float16``.
        stored: That weights which stay floats are stored in.
        bits: Of the weights of linear layers; None for floats.
        dynamic: Whether inputs of linear layers are rounded to bytes too.
        summary: For people.
    """

    name: str
    file: str
    dtype: str
    stored: str
    bits: int | None
    dynamic: bool
    summary: str

    @property
    def half(self) -> bool:
        """Whether it computes in float16."""
        return self.dtype == "float16"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        OnnxScheme("fp32", "model", "float32", "float32", None, False, "as the model computes"),
        OnnxScheme("fp16", "model_fp16", "float16", "float16", None, False,
                   "half the size, for GPUs and WebGPU"),
        OnnxScheme("bf16", "model_bf16", "float32", "bfloat16", None, False,
                   "weights of bfloat16, computed in float32"),
        OnnxScheme("int8", "model_quantized", "float32", "float32", 8, True,
                   "bytes for weights and, as it runs, for what they multiply"),
        OnnxScheme("int4", "model_q4", "float32", "float32", 4, False,
                   "4 bits with a scale for 32 weights (--block 128), 8 bits for embedding and "
                   "head"),
        OnnxScheme("int4-fp16", "model_q4f16", "float16", "float16", 4, False,
                   "the same, computed in float16, for WebGPU"),
    )
}  # fmt: skip


def find_scheme(word: str) -> OnnxScheme:
    """A scheme by its name.

    Raises:
        PackError: There is none of that name.
    """
    found = SCHEMES.get(word.lower())
    if found is None:
        raise PackError(
            f"'{word}' is no scheme of onnx{nearest(word, SCHEMES)}",
            f"Known: {', '.join(SCHEMES)}",
        )
    return found
