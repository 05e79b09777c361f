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

__all__ = ["front_matter", "quantized_card", "render_page"]

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
    text = render_page(
        _TEMPLATE,
        front_matter(model, "transformers", [target, "quantized"]),
        name=model.name,
        target=target,
        scheme=scheme,
        model=model.name,
        matrices=matrices,
        bits=f"{bits:.2f}",
        layout=layout,
        method=_method(details),
        calibration=details.get("calibration"),
        notes=list(notes),
    )
    return text.encode()


def front_matter(model: WholeModel, library: str, tags: Sequence[str]) -> dict[str, Any]:
    """What the Hub reads at the top of a page.

    Args:
        model: What was quantized.
        library: That loads it.
        tags: Of the page.
    """
    head: dict[str, Any] = {"library_name": library, "tags": list(tags)}
    bases = [source.reference for source in model.sources if source.revision is not None]
    if len(model.sources) == 1:
        stated = read_card(model.sources[0].checkpoint.folder).data
        for key in ("license", "license_name", "license_link", "language"):
            if stated.get(key):
                head[key] = stated[key]
    if bases:
        head |= {"base_model": bases, "base_model_relation": "quantized"}
    return head


def render_page(template: str, head: Mapping[str, Any], **values: Any) -> str:
    """Fill a template of a page.

    Args:
        template: Its name.
        head: See `front_matter`.
        values: What it shows.
    """
    environment = jinja2.Environment(  # noqa: S701 (Markdown, not HTML)
        loader=jinja2.FileSystemLoader(resource_folder("templates")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        front_matter=yaml.safe_dump(dict(head), sort_keys=True, allow_unicode=True),
        version=mergekit_lite.__version__,
        **values,
    )


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
