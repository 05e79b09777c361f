"""The JSON Schema of recipes, with every method's parameters, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_lite.recipe.parameters import IGNORED, Parameter
from mergekit_lite.recipe.schema import MethodSchema, Recipe

__all__ = ["json_schema"]

_ID = "https://json-schema.org/draft/2020-12/schema"


def json_schema(
    methods: Mapping[str, MethodSchema], aliases: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Describe recipes; ``merge_method`` decides which parameters are known.

    Args:
        methods: All merge methods.
        aliases: Words for families of methods.
    """
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    schema["$schema"] = _ID
    schema["title"] = "pack recipe"
    schema["properties"]["merge_method"]["enum"] = [*methods, *aliases]
    schema["required"] = []  # the command may name the method
    schema["allOf"] = []
    for name, family in {**{m: (m,) for m in methods}, **aliases}.items():
        known = {p.name: p for m in family for p in methods[m].parameters.values()}
        every = f"{name}_parameters"
        own = f"{name}_model_parameters"
        definitions[every] = _parameters(known)
        definitions[own] = _parameters({n: p for n, p in known.items() if p.each})
        entry = {"properties": {"parameters": {"$ref": f"#/$defs/{own}"}}}
        schema["allOf"].append(
            {
                "if": {
                    "properties": {"merge_method": {"const": name}},
                    "required": ["merge_method"],
                },
                "then": {
                    "properties": {
                        "parameters": {"$ref": f"#/$defs/{every}"},
                        "models": {"items": entry},
                        "slices": {
                            "items": {
                                "properties": {
                                    "parameters": {"$ref": f"#/$defs/{every}"},
                                    "sources": {"items": entry},
                                }
                            }
                        },
                    }
                },
            }
        )
    return schema


def _parameters(known: Mapping[str, Parameter]) -> dict[str, Any]:
    properties = {name: _setting(parameter) for name, parameter in known.items()}
    properties |= {
        name: {"description": f"Changes nothing: {why}"} for name, why in IGNORED.items()
    }
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _setting(parameter: Parameter) -> dict[str, Any]:
    value = _value(parameter)
    branch = {
        "type": "object",
        "properties": {"filter": {"type": ["string", "null"]}, "value": value},
        "required": ["value"],
        "additionalProperties": False,
    }
    result: dict[str, Any] = {
        "description": parameter.summary,
        "anyOf": [value, {"type": "array", "items": branch, "minItems": 1}],
    }
    if parameter.default is not None:
        result["default"] = parameter.default
    return result


def _value(parameter: Parameter) -> dict[str, Any]:
    if parameter.kind == "float":
        number: dict[str, Any] = {"type": "number"}
        if parameter.bounds:
            number |= {"minimum": parameter.bounds.low, "maximum": parameter.bounds.high}
        return {"anyOf": [number, {"type": "array", "items": number, "minItems": 1}]}
    words: list[Any] = list(parameter.choices)
    return {"enum": [True, False, 0, 1, *words] if parameter.kind == "bool" else words}
