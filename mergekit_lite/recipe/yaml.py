"""YAML as plain data and, beside it, the line of every key; strict where YAML is treacherous.

Only the types of JSON come out. Tags, repeated keys, deep nesting and aliases that unfold into more
than a recipe could need are refused. ``1e-3``, a string in YAML 1.1, is read as the number it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.errors import Mistake, PackError, RecipeError

__all__ = ["Document", "load_document"]

_MOST_BYTES = 1 << 18
_MOST_NODES = 20_000
_MOST_DEPTH = 32
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_INTEGER = re.compile(r"[-+]?\d{1,19}")
_TAG = "tag:yaml.org,2002:"

Place = tuple[str | int, ...]


class Document:
    """The data of a YAML file, and where each part of it stands.

    Attributes:
        source: Name of the file.
        data: Mappings, lists, strings, numbers, booleans and None.
        lines: Line of each key or item, counted from 1, by its path.
    """

    def __init__(self, source: str, data: Any, lines: Mapping[Place, int]) -> None:
        self.source = source
        self.data = data
        self.lines = lines

    def mistake(self, place: Place, message: str) -> Mistake:
        """A mistake at a path, with the line of the closest part of it that exists."""
        for end in range(len(place), -1, -1):
            line = self.lines.get(place[:end])
            if line is not None:
                return Mistake(place, message, line)
        return Mistake(place, message)


def load_document(text: str, source: str) -> Document:
    """Read YAML text.

    Raises:
        RecipeError: It is no YAML, or is YAML of a kind that a recipe never needs.
    """
    if len(text) > _MOST_BYTES:
        raise RecipeError(source, [Mistake((), f"longer than {_MOST_BYTES} characters")])
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise RecipeError(source, [Mistake((), f"not valid YAML: {error.problem}", line)]) from None
    except yaml.YAMLError as error:
        raise RecipeError(source, [Mistake((), f"not valid YAML: {error}")]) from None
    except RecursionError:
        raise RecipeError(source, [Mistake((), "nested too deeply")]) from None
    if node is None:
        raise RecipeError(
            source, [Mistake((), "the file is empty")], "Begin with one of: pack recipes"
        )
    builder = _Builder()
    data = builder.build(node, ())
    if builder.mistakes:
        raise RecipeError(source, builder.mistakes)
    return Document(source, data, builder.lines)


def read_text(path: Path) -> str:
    """Read a recipe's file.

    Raises:
        PackError: It cannot be read as text.
    """
    try:
        if path.is_file() and path.stat().st_size > 4 * _MOST_BYTES:
            raise PackError(f"{path}: too large to be a recipe", "Give a YAML file.")
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise PackError(f"{path}: no such file", "Check the path of the recipe.") from None
    except UnicodeDecodeError:
        raise PackError(f"{path}: is not a text file", "Give a YAML file in UTF-8.") from None
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror})") from None


class _Builder:
    def __init__(self) -> None:
        self.lines: dict[Place, int] = {}
        self.mistakes: list[Mistake] = []
        self._nodes = 0

    def build(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        self._nodes += 1
        if self._nodes > _MOST_NODES or len(place) > _MOST_DEPTH:
            if self._nodes <= _MOST_NODES + 1:
                self.mistakes.append(Mistake((), "unfolds into more than a recipe may hold", line))
            self._nodes = _MOST_NODES + 1
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*place, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        self.mistakes.append(Mistake(place, f"the tag {node.tag} is not allowed", line))
        return None

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _TAG + "merge":
                self.mistakes.append(Mistake(place, "a key must be plain text", line))
                continue
            key = key_node.value
            if key in result:
                self.mistakes.append(Mistake((*place, key), "this key stands here twice", line))
            self.lines[(*place, key)] = line
            result[key] = self.build(value_node, (*place, key))
        return result

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in {"yes", "true", "on"}
        if kind in {"int", "float", "str"} and node.style is None:
            if _INTEGER.fullmatch(text):
                return int(text)
            if _FLOAT.fullmatch(text) and len(text) < 40:
                return float(text)
        if kind in {"int", "float"}:
            line = node.start_mark.line + 1
            self.mistakes.append(
                Mistake(place, f"{text[:40]} is not a number that fits here", line)
            )
            return None
        if kind in {"str", "timestamp", "value"}:
            return text
        line = node.start_mark.line + 1
        self.mistakes.append(Mistake(place, f"the tag {node.tag} is not allowed", line))
        return None
