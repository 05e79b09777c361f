"""Vocabularies of models, read without running anything, and whether they can share embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mergekit_lite.checkpoint.safetensors import load_json
from mergekit_lite.errors import FileFormatError

__all__ = ["TOKENIZER_FILES", "conflicts", "read_vocabulary", "same_files", "vocabulary_of"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""What a tokenizer may consist of; the chat template is apart."""

_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def same_files(first: Path, second: Path) -> bool:
    """Whether two models' vocabulary files are equal byte by byte."""
    for name in (*_VOCABULARY_FILES, "added_tokens.json"):
        a, b = first / name, second / name
        if a.is_file() != b.is_file() or (a.is_file() and a.read_bytes() != b.read_bytes()):
            return False
    return True


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Read a model's tokens and their ids.

    Returns:
        None where the folder has no vocabulary that can be read without its library, such as a
        SentencePiece model alone.

    Raises:
        FileFormatError: A vocabulary file is broken.
    """
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        return vocabulary_of(load_json(path), path)
    if (folder / "vocab.json").is_file():
        tokens = _ids(load_json(folder / "vocab.json"), folder / "vocab.json")
        if (folder / "added_tokens.json").is_file():
            tokens |= _ids(load_json(folder / "added_tokens.json"), folder / "added_tokens.json")
        return tokens
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text("utf-8", errors="replace").split("\n")
        return {token: i for i, token in enumerate(lines) if token}
    return None


def vocabulary_of(document: Mapping[str, object], path: Path) -> dict[str, int]:
    """Tokens and their ids in the contents of a tokenizer.json.

    Raises:
        FileFormatError: It has no vocabulary, or a broken one; names the path.
    """
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        tokens = _ids(vocab, path)
    elif isinstance(vocab, list):  # Unigram: pairs of token and score
        try:
            tokens = {str(pair[0]): i for i, pair in enumerate(vocab)}
        except (TypeError, IndexError, KeyError):
            raise FileFormatError(f"{path}: its vocabulary is not a list of pairs") from None
    else:
        raise FileFormatError(f"{path}: has no vocabulary", "Download the file again.")
    added = document.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if not isinstance(token, dict) or not isinstance(token.get("id"), int):
            raise FileFormatError(f"{path}: an added token has no id", "Download the file again.")
        tokens[str(token.get("content"))] = token["id"]
    return tokens


def _ids(mapping: Mapping[str, object], path: Path) -> dict[str, int]:
    for token, number in mapping.items():
        if not isinstance(number, int):
            raise FileFormatError(
                f"{path}: the token {json.dumps(token)[:40]} has no id", "Download the file again."
            )
    return dict(mapping)  # type: ignore[arg-type]


def conflicts(first: Mapping[str, int], second: Mapping[str, int]) -> list[tuple[int, str, str]]:
    """Ids that mean different tokens in two vocabularies: id, token in the first, in the second."""
    by_id = {number: token for token, number in first.items()}
    return sorted(
        (number, by_id[number], token)
        for token, number in second.items()
        if number in by_id and by_id[number] != token
    )
