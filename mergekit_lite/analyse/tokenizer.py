"""What a model's tokenizer is, from its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.safetensors import load_json
from mergekit_lite.errors import PackError
from mergekit_lite.tokenizer.vocabulary import read_vocabulary, vocabulary_of

__all__ = ["TokenizerView", "view_tokenizer"]

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_BINARY = {
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "tekken.json": "Tekken",
}
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class TokenizerView:
    """A tokenizer.

    Attributes:
        kind: What it is made of, for example ``BPE``; None where there is none.
        name: Its class in transformers; None if it is not stated.
        tokens: Number of tokens with added ones; None where that is not plain.
        added: How many of them were added beside the vocabulary.
        special: Tokens by their role.
        context: Tokens that it may give to the model; None if it is not stated.
        chat_template: Whether there is one.
        notes: What is wrong with it.
    """

    kind: str | None = None
    name: str | None = None
    tokens: int | None = None
    added: int = 0
    special: Mapping[str, str] = field(default_factory=dict)
    context: int | None = None
    chat_template: bool = False
    notes: tuple[str, ...] = ()


def view_tokenizer(folder: Path | None) -> TokenizerView:
    """Look at the tokenizer of a model; a broken file is noted, not an error."""
    if folder is None:
        return TokenizerView()
    notes: list[str] = []
    config = _read(folder / "tokenizer_config.json", notes)
    special = {**_read(folder / "special_tokens_map.json", notes), **config}
    kind, tokens, added = _vocabulary(folder, notes)
    name, context = config.get("tokenizer_class"), config.get("model_max_length")
    template = bool(config.get("chat_template")) or any((folder / n).is_file() for n in _TEMPLATES)
    return TokenizerView(
        kind=kind,
        name=name if isinstance(name, str) else None,
        tokens=tokens,
        added=added,
        special={
            role.removesuffix("_token"): text
            for role in _SPECIAL
            if (text := _content(special.get(role)))
        },
        # transformers writes 1e30 where there is no limit
        context=context if isinstance(context, int) and 0 < context < 1 << 40 else None,
        chat_template=template,
        notes=tuple(notes),
    )


def _vocabulary(folder: Path, notes: list[str]) -> tuple[str | None, int | None, int]:
    """Kind, number of tokens, and how many of them were added."""
    path = folder / "tokenizer.json"
    if path.is_file():
        document = _read(path, notes)
        model = document.get("model")
        if not isinstance(model, dict):
            notes += [f"{path}: has no model"] if document else []
            return "unreadable", None, 0
        stated = model.get("vocab")
        own = len(stated) if isinstance(stated, dict | list) else 0
        try:
            tokens = len(vocabulary_of(document, path))
        except PackError as error:
            notes.append(error.message)
            return str(model.get("type") or "vocabulary"), None, 0
        return str(model.get("type") or "vocabulary"), tokens, max(0, tokens - own)
    binary = next((kind for name, kind in _BINARY.items() if (folder / name).is_file()), None)
    try:
        found = read_vocabulary(folder)
    except (PackError, OSError) as error:
        notes.append(str(error).splitlines()[0])
        found = None
    if found is None:
        return binary, None, 0
    return "BPE" if (folder / "merges.txt").is_file() else "vocabulary", len(found), 0


def _content(value: object) -> str:
    """A special token, written as text or with its options."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _read(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return load_json(path)
    except PackError as error:
        notes.append(error.message)
        return {}
