"""The model card: what pack knows is filled in, what only the author knows is asked for.

Templates are rendered in Jinja's sandbox, from text, with nothing but data: no file is reached, no
attribute of Python's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergekit_lite.errors import PackError
from mergekit_lite.release.licences.table import find_licence, hub_ids
from mergekit_lite.resources import resource_folder

__all__ = ["front_matter", "lint_front_matter", "render", "render_card", "standard_template"]

_LONGEST = 1 << 20
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "base_model": (str, list), "language": (str, list), "library_name": (str,),
    "license_link": (str,), "license_name": (str,), "model-index": (list,), "pipeline_tag": (str,),
    "tags": (list,),
}  # fmt: skip
_SECONDS = 5
_MEMORY = 2 << 30
"""What a template of one's own may take: seconds of a processor, and bytes."""


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
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The head of a card, as the Hub reads it.

    Args:
        licence: Of the release; what the Hub has no word for becomes ``other`` with name and link.
        bases: Models on the Hub that it was made of.
        relation: ``merge``, ``adapter``, ``finetune`` or ``quantized``.
        languages: Codes of languages.
        tags: More words.
        library: What loads it.
        results: What was measured, as ``model-index`` has it.
    """
    head: dict[str, Any] = {}
    if licence is not None:
        found = find_licence(licence)
        name = found.id if found else licence
        head["license"] = name if name in hub_ids() else "other"
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
    if results:
        head["model-index"] = [dict(result) for result in results]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def lint_front_matter(card: str) -> list[str]:
    """What the Hub would not take, or not understand, of a card's head; nothing if all is well."""
    parts = card.split("---\n", 2)
    if not card.startswith("---\n") or len(parts) < 3:
        return ["it begins with no front matter"]
    try:
        head = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return [f"its front matter is no YAML ({str(error).splitlines()[0]:.100})"]
    if not isinstance(head, dict):
        return ["its front matter is no mapping"]
    found = []
    licence = head.get("license")
    if licence is not None and licence not in hub_ids():
        found.append(f"the Hub has no license '{licence}'; write other, license_name, license_link")
    if licence == "other" and not (head.get("license_name") and head.get("license_link")):
        found.append("license: other needs license_name and license_link")
    for key, kind in _KINDS.items():
        if key in head and not isinstance(head[key], kind):
            found.append(f"'{key}' is a {type(head[key]).__name__}")
    relation = head.get("base_model_relation")
    if relation is not None and relation not in _RELATIONS:
        found.append(f"the Hub has no base_model_relation '{relation}'")
    return found


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
    if template != standard_template() and what == "card":
        return _apart(template, values)
    return _rendered(template, values, what)


def _apart(template: str, values: Mapping[str, Any]) -> str:
    """Render a template of somebody's own in a process that may not take long or grow large."""
    try:
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "mergekit_lite.release.card"],
            input=json.dumps({"template": template, "values": dict(values)}).encode(),
            capture_output=True, timeout=4 * _SECONDS, check=False,
        )  # fmt: skip
        answer = json.loads(ran.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise PackError(
            f"the template of the card cannot be rendered: it takes more than {_SECONDS} seconds "
            "or too much memory",
            "Templates get data only; see templates/card.md.jinja for what there is.",
        ) from None
    if "error" in answer:
        raise PackError(answer["error"], answer["hint"])
    return str(answer["text"])


def _render_here() -> None:
    """Render what comes in, within limits; for `_apart`."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    asked = json.load(sys.stdin)
    try:
        answer = {"text": _rendered(asked["template"], asked["values"], "card")}
    except PackError as error:
        answer = {"error": error.message, "hint": error.hint}
    sys.stdout.write(json.dumps(answer))


def _rendered(template: str, values: Mapping[str, Any], what: str) -> str:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        text = environment.from_string(template).render(**values)
        text.encode()
    except Exception as error:  # whatever a template may do
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        raise PackError(
            f"the template of the {what} cannot be rendered{where}: {error}",
            "Templates get data only; see templates/card.md.jinja for what there is.",
        ) from None
    if len(text) > _LONGEST:
        raise PackError(f"the {what} has {len(text)} characters", "Shorten its template.")
    return text


if __name__ == "__main__":
    _render_here()
