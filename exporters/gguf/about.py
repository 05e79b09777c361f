"""What a GGUF file says of its model: name, version, licence, what it was made from.

Keys: ``general.*`` of the GGUF specification (docs/gguf.md of the ggml project).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from exporters.gguf.metadata import Value, text, texts, u32
from mergekit_lite.checkpoint.card import Card, read_card
from mergekit_lite.checkpoint.hub import parse_reference
from mergekit_lite.merge.model import WholeModel

__all__ = ["about", "size_label"]

_SITE = "https://huggingface.co/"


def about(model: WholeModel) -> dict[str, Value]:
    """Metadata that says what a model is and where it comes from; no paths of this machine."""
    recipe = model.recipe
    single = recipe is None and len(model.sources) == 1
    cards = [read_card(source.checkpoint.folder) for source in model.sources]
    own = cards[0] if single else Card(None, ())
    found: dict[str, Value] = {"general.name": text(_name(model, own))}
    if recipe is not None and recipe.version:
        found["general.version"] = text(recipe.version)
    for key in ("author", "organization", "description"):
        stated = own.data.get(key)
        if isinstance(stated, str) and stated:
            found[f"general.{key}"] = text(stated)
    elements = sum(model.checkpoint.spec(n).elements for n in model.checkpoint.names())
    found["general.size_label"] = text(size_label(elements))
    found |= _licence(cards)
    every = sorted(model.sources, key=lambda source: source.reference)
    made_of = [(s.reference, s.revision is not None) for s in every]
    found |= _bases([(base, True) for base in own.base] if single else made_of)
    for key, name in (("tags", "tags"), ("language", "languages")):
        values = own.texts(key)
        if values:
            found[f"general.{name}"] = texts(values)
    return found


def _name(model: WholeModel, card: Card) -> str:
    stated = card.data.get("model_name")
    return stated if isinstance(stated, str) and stated else model.name


def _licence(cards: Sequence[Card]) -> dict[str, Value]:
    """The licence, where all that went in states one and the same."""
    stated = {
        tuple(card.texts(key) for key in ("license", "license_name", "license_link"))
        for card in cards
    }
    if len(stated) != 1:
        return {}
    keys = ("general.license", "general.license.name", "general.license.link")
    return {
        key: text(", ".join(values))
        for key, values in zip(keys, stated.pop(), strict=True)
        if values
    }


def _bases(references: Sequence[tuple[str, bool]]) -> dict[str, Value]:
    """What it was made from: names, and addresses for what lies on the Hub."""
    found: dict[str, Value] = {}
    for number, (reference, on_hub) in enumerate(references):
        key = f"general.base_model.{number}"
        hub = parse_reference(reference) if on_hub else None
        found[f"{key}.name"] = text(Path(reference if hub is None else hub.repo).name)
        if hub is not None:
            found[f"{key}.organization"] = text(hub.repo.partition("/")[0])
            found[f"{key}.repo_url"] = text(_SITE + hub.repo)
            if hub.revision:
                found[f"{key}.version"] = text(hub.revision)
    return {"general.base_model.count": u32(len(references)), **found} if found else {}


def size_label(elements: int) -> str:
    """A number of weights as models are named by it: ``1.1B``, ``360M``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if elements >= 0.995 * size:
            return re.sub(r"\.0$", "", f"{elements / size:.1f}") + unit
    return str(elements)
