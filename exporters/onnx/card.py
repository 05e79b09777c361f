"""The page of a model in ONNX: what it is, how to run it, how it was made."""

from __future__ import annotations

from collections.abc import Sequence

from exporters.linears.card import front_matter, render_page
from exporters.onnx.check import Checked
from exporters.onnx.graph import Kind
from exporters.onnx.schemes import OnnxScheme
from mergekit_lite.merge.model import WholeModel

__all__ = ["onnx_card"]

_TEMPLATE = "onnx.md.jinja"
_JS_NAMES = {
    "fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4", "int4-fp16": "q4f16",
}  # fmt: skip


def onnx_card(
    model: WholeModel,
    scheme: OnnxScheme,
    kind: Kind,
    route: str,
    bits: float,
    checked: Checked | None,
    notes: Sequence[str],
) -> bytes:
    """Write the page.

    Args:
        model: What was exported.
        scheme: Kind of file.
        kind: Of the model.
        route: What made the graph.
        bits: Per weight.
        checked: How far it is from the model; None where it was not run.
        notes: What the user should know.
    """
    return render_page(
        _TEMPLATE,
        front_matter(model, "transformers.js", ["onnx", scheme.name]),
        name=model.name,
        scheme=scheme.name,
        summary=scheme.summary,
        file=f"onnx/{scheme.file}.onnx",
        kind=kind,
        route=route,
        bits=f"{bits:.2f}",
        js_dtype=_JS_NAMES.get(scheme.name),
        checked=None if checked is None else checked.describe(),
        notes=list(notes),
    ).encode()
