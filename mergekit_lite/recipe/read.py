"""From YAML to a checked recipe; every mistake in one report, with lines and near words."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mergekit_lite.dtypes import DTYPES, by_config_name
from mergekit_lite.errors import Mistake, PackError, RecipeError, nearest
from mergekit_lite.recipe.parameters import IGNORED, Setting, parse_setting
from mergekit_lite.recipe.schema import AdaptedModel, MethodSchema, Recipe
from mergekit_lite.recipe.yaml import Document, Place, load_document, read_text

__all__ = ["parse_recipe", "read_recipe"]

Methods = Mapping[str, MethodSchema]
Aliases = Mapping[str, tuple[str, ...]]

_LATER = {
    "modules": "merging by modules is not supported; merge each part with a recipe of its own",
    "tokens": "choosing embeddings token by token is not supported yet",
    "pad_to_multiple_of": "padding the vocabulary is not supported yet",
    "lora": "write the adapter into 'model' (base+adapter), or list it under 'adapters'",
}


_ELSEWHERE = {
    "model_stock": "linear",
    "karcher": "slerp",
    "nuslerp": "slerp",
    "multislerp": "slerp",
    "nearswap": "slerp",
    "arcee_fusion": "ties",
    "breadcrumbs": "task_arithmetic",
    "breadcrumbs_ties": "ties",
    "della": "dare_ties",
    "della_linear": "dare_linear",
    "sce": "ties",
    "ram": "ties",
}
"""Methods of mergekit that pack does not have yet, and the nearest one that it has."""

_TYPE_WORDS = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "f16": "float16",
    "fp32": "float32", "float": "float32", "f32": "float32", "fp64": "float64",
    "double": "float64",
}  # fmt: skip
_KEY_WORDS = {"random_seed": "seed", "base": "base_model", "method": "merge_method"}


def read_recipe(
    path: Path, methods: Methods, aliases: Aliases, method: str | None = None
) -> Recipe:
    """Read a recipe's file; see `parse_recipe`."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "merged"
    return parse_recipe(read_text(path), str(path), stem, methods, aliases, method)


def parse_recipe(
    text: str, source: str, name: str, methods: Methods, aliases: Aliases, method: str | None = None
) -> Recipe:
    """Check a recipe's text.

    Args:
        text: YAML.
        source: Where it came from, for messages.
        name: Name of the result, if the recipe gives none.
        methods: All merge methods.
        aliases: Words for families of methods; the first of a family is meant by the word.
        method: The method that the command names; fills in or must agree with ``merge_method``.

    Raises:
        RecipeError: Every mistake that was found.
    """
    document = load_document(text, source)
    if not isinstance(document.data, dict):
        raise RecipeError(source, [document.mistake((), "a recipe is a mapping of keys to values")])
    mistakes: list[Mistake] = []
    known = frozenset(name for each in methods.values() for name in each.parameters)
    data = _in_one_line(document, mistakes)
    data["merge_method"] = _method(document, methods, aliases, method)
    data.setdefault("name", name)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        mistakes += [_translate(document, detail, known) for detail in error.errors()]
    schema = methods[data["merge_method"]]
    settings, wrong = _settings(document, data["merge_method"], schema)
    mistakes += wrong
    mistakes += _types(document)
    if recipe is not None:
        mistakes += _sense(document, recipe, schema)
    if mistakes or recipe is None:
        raise RecipeError(source, mistakes)
    _attach(recipe, settings)
    return recipe


def _in_one_line(document: Document, mistakes: list[Mistake]) -> dict[str, Any]:
    """The recipe with every mapping of a base and adapters as base+adapter."""
    data: dict[str, Any] = copy.deepcopy(document.data)
    places: list[tuple[Place, dict[str, Any], str]] = [((), data, "base_model")]
    places += [(at, entry, "model") for at, entry, of_model in _sections(data) if of_model]
    for at, entry, key in places:
        if isinstance(entry.get(key), str):
            entry[key] = _plain_path(entry[key])
        value, place = entry.get(key), (*at, key)
        if isinstance(value, dict):
            entry[key] = _adapted(document, mistakes, place, value) or "?"
        elif key == "model" and isinstance(value, str) and entry.get("adapters") is not None:
            both = {"model": value, "adapters": entry.pop("adapters")}
            entry[key] = _adapted(document, mistakes, at, both) or value
    return data


def _plain_path(reference: str) -> str:
    """A path without what makes two spellings of one: ``./m/base/`` is ``m/base``."""
    is_path = reference.startswith(("./", "../", "/", "~")) or reference.endswith("/")
    if "+" in reference or "://" in reference or not (is_path or "//" in reference):
        return reference
    return os.path.normpath(reference)


def _adapted(
    document: Document, mistakes: list[Mistake], place: Place, value: dict[str, Any]
) -> str | None:
    adapters = value.get("adapters")
    if isinstance(adapters, list):
        spelled = [{"path": a} if isinstance(a, str) else a for a in adapters]
        value = {**value, "adapters": spelled}
    try:
        return AdaptedModel.model_validate(value).reference
    except ValidationError as error:
        for detail in error.errors():
            detail["loc"] = (*place, *detail["loc"])
            mistakes.append(_translate(document, detail))
    return None


def _method(document: Document, methods: Methods, aliases: Aliases, wanted: str | None) -> str:
    """The merge method that recipe and command agree on."""
    stated = document.data.get("merge_method")
    known = [*methods, *aliases]
    if wanted is not None and wanted not in known:
        raise PackError(_no_method(wanted, known), "See: pack methods")
    if stated is None:
        if wanted is None and document.data.get("output") == "adapters":
            return "passthrough"  # nothing is merged
        if wanted is None:
            raise RecipeError(
                document.source,
                [document.mistake((), "has no 'merge_method'")],
                f"Add one of: {', '.join(methods)}",
            )
        return aliases.get(wanted, (wanted,))[0]
    if not isinstance(stated, str) or stated not in known:
        message = _no_method(stated, known)
        raise RecipeError(
            document.source,
            [document.mistake(("merge_method",), message)],
            f"Known methods: {', '.join(methods)}",
        )
    meant = aliases.get(stated, (stated,))
    if wanted is None:
        return meant[0]
    allowed = [m for m in aliases.get(wanted, (wanted,)) if m in meant]
    if not allowed:
        raise RecipeError(
            document.source,
            [
                document.mistake(
                    ("merge_method",), f"the recipe says '{stated}', the command says '{wanted}'"
                )
            ],
            f"Run: pack merge {stated} {document.source}   (or change the recipe)",
        )
    return allowed[0]


def _no_method(name: object, known: list[str]) -> str:
    if isinstance(name, str) and name in _ELSEWHERE:
        return (
            f"'{name}' is a method of mergekit that pack does not have yet; "
            f"the nearest one here is '{_ELSEWHERE[name]}'"
        )
    return f"there is no merge method {name!r:.60}{nearest(str(name), known)}"


def _translate(
    document: Document, detail: ErrorDetails, parameters: frozenset[str] = frozenset()
) -> Mistake:
    place = tuple(detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    key = str(place[-1]) if place else ""
    if kind == "extra_forbidden":
        if key in _LATER:
            return document.mistake(place, _LATER[key])
        if key in parameters:
            return document.mistake(place, "belongs under 'parameters:', one level deeper")
        if key in _KEY_WORDS and _KEY_WORDS[key] in _known_keys(place):
            return document.mistake(place, f"unknown key; did you mean '{_KEY_WORDS[key]}'?")
        return document.mistake(place, f"unknown key{nearest(key, _known_keys(place))}")
    if kind == "missing":
        return document.mistake(place, "is missing")
    value = repr(detail["input"])[:60]
    expected = {
        "string_type": "expected text",
        "int_type": "expected a whole number",
        "list_type": "expected a list",
        "dict_type": "expected a mapping",
        "model_type": "expected a mapping",
        "model_attributes_type": "expected a mapping",
        "too_short": f"expected at least {context.get('min_length')} entries",
        "too_long": f"expected at most {context.get('max_length')} entries",
        "string_too_short": "must not be empty",
        "literal_error": f"expected {context.get('expected')}",
    }.get(kind)
    if kind == "string_pattern_mismatch":
        expected = (
            "expected a semantic version such as 1.0.0"
            if key == "version"
            else "expected letters, digits, '.', '_' and '-' only, at most 96"
        )
    return document.mistake(place, f"{value}: {expected or detail['msg'].lower()}")


def _known_keys(place: Place) -> list[str]:
    """The keys of the section that a path leads into."""
    section: Any = Recipe
    for part in place[:-1]:
        if part in ("model", "base_model"):
            section = AdaptedModel
        elif part in ("models", "slices", "sources", "tokenizer", "adapters"):
            annotation = section.model_fields[part].annotation
            section = next(c for c in _classes(annotation))
    return list(section.model_fields)


def _classes(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _classes(part)


def _sections(data: Any) -> Iterator[tuple[Place, dict[str, Any], bool]]:
    """Every place of a recipe's data that may have parameters; the flag says: of one model."""
    if not isinstance(data, dict):
        return
    yield (), data, False
    for i, entry in enumerate(data.get("models") or []):
        if isinstance(entry, dict):
            yield ("models", i), entry, True
    for i, part in enumerate(data.get("slices") or []):
        if isinstance(part, dict):
            yield ("slices", i), part, False
            for j, entry in enumerate(part.get("sources") or []):
                if isinstance(entry, dict):
                    yield ("slices", i, "sources", j), entry, True


def _settings(
    document: Document, method: str, schema: MethodSchema
) -> tuple[dict[Place, dict[str, Setting]], list[Mistake]]:
    """Parse the parameters of all places."""
    found: dict[Place, dict[str, Setting]] = {}
    mistakes: list[Mistake] = []
    for place, section, of_model in _sections(document.data):
        raw = section.get("parameters")
        if not isinstance(raw, dict):
            continue
        here = found.setdefault(place, {})
        for name, value in raw.items():
            at = (*place, "parameters", name)
            if name in IGNORED:
                continue
            parameter = schema.parameters.get(name)
            if parameter is None:
                close = nearest(name, schema.parameters)
                known = ", ".join(schema.parameters)
                text = f"'{method}' has no parameter '{name}'{close or f' (it has: {known})'}"
                mistakes.append(document.mistake(at, text))
            elif of_model and not parameter.each:
                text = f"'{name}' belongs to the whole merge; move it to the recipe's 'parameters'"
                mistakes.append(document.mistake(at, text))
            else:
                setting, problems = parse_setting(value, parameter)
                mistakes += [document.mistake((*at, *p), message) for p, message in problems]
                if setting:
                    here[name] = setting
    return found, mistakes


def _types(document: Document) -> Iterator[Mistake]:
    """Names of floating-point types that there are none of."""
    for key in ("dtype", "out_dtype"):
        value = document.data.get(key)
        if not isinstance(value, str):
            continue
        dtype = by_config_name(value)
        if dtype is None or not dtype.is_float:
            names = [d.config_name for d in DTYPES.values() if d.is_float]
            meant = _TYPE_WORDS.get(value.lower())
            close = f"; did you mean '{meant}'?" if meant else nearest(value, names)
            close = close or f"; known: {', '.join(names)}"
            yield document.mistake((key,), f"unknown floating-point type '{value}'{close}")


def _sense(document: Document, recipe: Recipe, schema: MethodSchema) -> Iterator[Mistake]:
    """What single keys cannot tell: how they fit together."""
    if (recipe.models is None) == (recipe.slices is None):
        found = "both" if recipe.models else "neither"
        yield document.mistake((), f"exactly one of 'models' and 'slices' is needed, found {found}")
        return
    if recipe.tokenizer and recipe.tokenizer_source:
        yield document.mistake(("tokenizer",), "give 'tokenizer' or 'tokenizer_source', not both")
    adapter = recipe.output != "model"
    for key in ("rank", "energy"):
        if not adapter and getattr(recipe, key) is not None:
            yield document.mistake((key,), f"'{key}' goes with 'output: adapter'")
    if schema.base and recipe.base_model is None and not adapter:
        yield document.mistake((), f"'{recipe.merge_method}' needs a 'base_model'")
    if not adapter:
        yield from _counts(document, recipe, schema)


def _counts(document: Document, recipe: Recipe, schema: MethodSchema) -> Iterator[Mistake]:
    groups: list[tuple[Place, list[str]]] = []
    if recipe.models is not None:
        groups.append((("models",), [entry.model for entry in recipe.models]))
    for i, part in enumerate(recipe.slices or []):
        groups.append((("slices", i, "sources"), [s.model for s in part.sources]))
        for j, source in enumerate(part.sources):
            if source.layer_range[0] >= source.layer_range[1]:
                at = ("slices", i, "sources", j, "layer_range")
                yield document.mistake(at, f"{source.layer_range} holds no layer")
        lengths = {s.layer_range[1] - s.layer_range[0] for s in part.sources}
        if len(lengths) > 1:
            yield document.mistake(
                ("slices", i, "sources"),
                f"sources have different numbers of layers: {sorted(lengths)}",
            )
    low, high = schema.models
    for place, names in groups:
        others = [n for n in names if not (schema.base and n == recipe.base_model)]
        if len(others) < low or (high is not None and len(others) > high):
            wanted = str(low) if low == high else f"at least {low}"
            beside = " beside the base model" if schema.base else ""
            text = f"'{recipe.merge_method}' takes {wanted} model{'' if low == 1 else 's'}{beside}"
            yield document.mistake(place, f"{text}, found {len(others)}")


def _attach(recipe: Recipe, settings: Mapping[Place, dict[str, Setting]]) -> None:
    """Hang the parsed parameters on their sections."""
    for place, values in settings.items():
        section: Any = recipe
        for part in place:
            section = section[part] if isinstance(part, int) else getattr(section, part)
        section.__dict__["_settings"] = values
