"""What every kind of vocabulary has: tokens with types, taken from files that are read as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NoReturn

from exporters.gguf.metadata import Value
from mergekit_lite.errors import PackError

__all__ = ["SPACE", "Files", "Pieces", "Token", "TokenKind", "single_steps"]

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        text: As it stands in the file.
        kind: What it is for.
        score: Its weight, where the kind of vocabulary has some.
    """

    text: str
    kind: TokenKind = TokenKind.NORMAL
    score: float = 0.0


@dataclass
class Pieces:
    """What a reader of one kind of vocabulary finds.

    Attributes:
        model: ``tokenizer.ggml.model``.
        tokens: By id.
        metadata: Keys of this kind alone.
        scored: Whether scores are written.
        prefixed: Whether a space is put before a text.
        specials: Names of special tokens by role, where the kind of file says so.
        around: Whether a text is begun and ended with special tokens; None where the file does not
            say.
        notes: What the user should know.
    """

    model: str
    tokens: dict[int, Token]
    metadata: dict[str, Value] = field(default_factory=dict)
    scored: bool = False
    prefixed: bool = False
    specials: dict[str, str] = field(default_factory=dict)
    around: tuple[bool, bool] | None = None
    notes: list[str] = field(default_factory=list)


class Files:
    """The small files beside a model's weights.

    Args:
        contents: By name.
        label: How the user named the model.
    """

    def __init__(self, contents: Mapping[str, bytes], label: str) -> None:
        self.contents = contents
        self.label = label

    def json(self, name: str) -> Mapping[str, Any]:
        """A file's contents; empty where there is none.

        Raises:
            PackError: It is no JSON object.
        """
        if name not in self.contents:
            return {}
        try:
            found = json.loads(self.contents[name])
        except (ValueError, RecursionError) as error:
            self.refuse(f"{name} is not valid JSON ({error})", "Copy it again.")
        if not isinstance(found, dict):
            self.refuse(f"{name} is not a JSON object", "Copy it again.")
        return found

    def number(self, token: object, number: object) -> int:
        """A token's id.

        Raises:
            PackError: It is none.
        """
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            self.refuse(f"its token {token!r:.40} has no id", "Download tokenizer.json again.")
        return int(number)

    def refuse(self, message: str, hint: str = "") -> NoReturn:
        """Refuse the vocabulary."""
        raise PackError(f"{self.label}: {message}", hint)


def single_steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or post-processor, sequences opened."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") == "Sequence":
        return [step for each in part.get(key) or [] for step in single_steps(each, key)]
    return [part]
