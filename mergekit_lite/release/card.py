"""The model card: what pack knows is filled in, what only the author knows is asked for.

Templates are rendered in Jinja's sandbox, from text, with nothing but data: no file is reached, no
attribute of Python's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergekit_lite.errors import PackError
from mergekit_lite.release.licences.table import find_licence
from mergekit_lite.resources import resource_folder

__all__ = ["front_matter", "render", "render_card", "standard_template"]

_LONGEST = 1 << 20


def standard_template() -> str:
    """The template that comes with pack."""
    return (resource_folder("templates") / "card.md.jinja").read_text("utf-8")


def front_matter(
    licence: str | None,
    bases: Sequence[str],
    relation: str,
    languages: Sequence[str],
    tags: Sequence[str],
    library: str,
) -> str:
    """The head of a card, as the Hub reads it.

    Args:
        licence: Of the release; what the Hub has no word for becomes ``other`` with name and link.
        bases: Models on the Hub that it was made of.
        relation: ``merge``, ``adapter``, ``finetune`` or ``quantized``.
        languages: Codes of languages.
        tags: More words.
        library: What loads it.
    """
    head: dict[str, Any] = {}
    if licence is not None:
        found = find_licence(licence)
        name = found.id if found else licence
        head["license"] = name if found is not None and found.hub else "other"
        if head["license"] == "other":
            head["license_name"] = name
            head["license_link"] = found.url if found else "LICENSE"
    if bases:
        head["base_model"] = list(bases)
        head["base_model_relation"] = relation
    if languages:
        head["language"] = list(languages)
    head["library_name"] = library
    head["pipeline_tag"] = "text-generation"
    head["tags"] = list(dict.fromkeys([*(["merge"] if relation == "merge" else []), *tags]))
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def render_card(template: str, values: Mapping[str, Any]) -> bytes:
    """Render a card.

    Args:
        template: Its text.
        values: What it may name.

    Raises:
        PackError: The template is wrong, or reaches for what it may not have.
    """
    return render(template, values, "card").encode()


def render(template: str, values: Mapping[str, Any], what: str) -> str:
    """Render a text in the sandbox.

    Raises:
        PackError: The template is wrong, or reaches for what it may not have.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        text = environment.from_string(template).render(**values)
    except (TemplateError, RecursionError, OverflowError, MemoryError, TypeError) as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        raise PackError(
            f"the template of the {what} cannot be rendered{where}: {error}",
            "Templates get data only; see templates/card.md.jinja for what there is.",
        ) from None
    if len(text) > _LONGEST:
        raise PackError(f"the {what} has {len(text)} characters", "Shorten its template.")
    return text
