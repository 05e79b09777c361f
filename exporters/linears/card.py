"""The page of a quantized model: what it is, how to load it, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml

import mergekit_lite
from mergekit_lite.checkpoint.card import read_card
from mergekit_lite.merge.model import WholeModel
from mergekit_lite.resources import resource_folder

__all__ = ["quantized_card"]

_TEMPLATE = "quantized.md.jinja"


def quantized_card(
    model: WholeModel,
    target: str,
    scheme: str,
    layout: str,
    bits: float,
    matrices: int,
    details: Mapping[str, Any],
    notes: Sequence[str],
) -> bytes:
    """Write the page.

    Args:
        model: What was quantized.
        target: ``gptq``, ``awq`` …
        scheme: As the user wrote it.
        layout: How it lies in files: ``quant_method`` of its config.
        bits: Per weight.
        matrices: How many were quantized.
        details: How it was computed.
        notes: What the user should know.
    """
    head: dict[str, Any] = {"library_name": "transformers", "tags": [target, "quantized"]}
    bases = [source.reference for source in model.sources if source.revision is not None]
    if len(model.sources) == 1:
        stated = read_card(model.sources[0].checkpoint.folder).data
        for key in ("license", "license_name", "license_link", "language"):
            if stated.get(key):
                head[key] = stated[key]
    if bases:
        head |= {"base_model": bases, "base_model_relation": "quantized"}
    environment = jinja2.Environment(  # noqa: S701 (Markdown, not HTML)
        loader=jinja2.FileSystemLoader(resource_folder("templates")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    text = environment.get_template(_TEMPLATE).render(
        front_matter=yaml.safe_dump(head, sort_keys=True, allow_unicode=True),
        name=model.name,
        target=target,
        scheme=scheme,
        model=model.name,
        matrices=matrices,
        bits=f"{bits:.2f}",
        layout=layout,
        version=mergekit_lite.__version__,
        method=_method(details),
        calibration=details.get("calibration"),
        notes=list(notes),
    )
    return text.encode()


def _method(details: Mapping[str, Any]) -> str:
    names = {
        "rtn": "rounded to the nearest code",
        "gptq": "GPTQ",
        "awq": "AWQ's scales",
        "smoothquant": "SmoothQuant's scales",
    }
    found = names.get(str(details.get("method")), str(details.get("method")))
    rounding = details.get("rounding")
    if isinstance(rounding, Mapping):
        return f"{found}, rounded as GPTQ rounds"
    return f"{found}, rounded to the nearest code" if rounding == "nearest" else found
