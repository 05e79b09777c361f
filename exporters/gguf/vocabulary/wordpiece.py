"""WordPiece (BERT): words are cut into the longest pieces that there are.

A word of more than 100 characters is unknown to BERT's tokenizer as a whole; llama.cpp cuts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporters.gguf.metadata import flag
from exporters.gguf.vocabulary.base import SPACE, Files, Pieces, Token, TokenKind, single_steps

__all__ = ["read_word_list", "read_wordpiece"]

_CONTINUED = "##"


def read_wordpiece(files: Files, tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> Pieces:
    """Read the vocabulary of a tokenizer.json.

    Raises:
        PackError: llama.cpp has no equal of a part of it.
    """
    if model.get("continuing_subword_prefix", _CONTINUED) != _CONTINUED:
        files.refuse(
            f"its pieces within words begin with {model['continuing_subword_prefix']!r}; llama.cpp "
            f"knows {_CONTINUED!r}"
        )
    lowercase = accents = False
    for step in single_steps(tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") != "BertNormalizer" or not step.get("clean_text", True):
            files.refuse(
                f"its tokenizer.json normalises text by {step.get('type')}, which llama.cpp does "
                "not do for WordPiece"
            )
        lowercase = bool(step.get("lowercase", True))
        stripped = step.get("strip_accents")
        accents = lowercase if stripped is None else bool(stripped)
    kinds = {s.get("type") for s in single_steps(tokenizer.get("pre_tokenizer"), "pretokenizers")}
    if kinds - {"BertPreTokenizer"}:
        files.refuse(
            f"its tokenizer.json cuts text by {', '.join(map(str, kinds))}, which llama.cpp does "
            "not do for WordPiece"
        )
    return _pieces(files, model["vocab"], lowercase, accents, str(model.get("unk_token", "[UNK]")))


def read_word_list(files: Files, name: str) -> Pieces:
    """Read a list of pieces, one in a line, as BERT was first published with."""
    words = files.contents[name].decode("utf-8", "replace").split("\n")
    while words and not words[-1]:
        words.pop()
    settings = files.json("tokenizer_config.json")
    lowercase = bool(settings.get("do_lower_case", True))
    stripped = settings.get("strip_accents")
    accents = lowercase if stripped is None else bool(stripped)
    vocabulary = {word.rstrip("\r"): number for number, word in enumerate(words)}
    return _pieces(files, vocabulary, lowercase, accents, str(settings.get("unk_token", "[UNK]")))


def _pieces(
    files: Files, vocabulary: Mapping[str, Any], lowercase: bool, accents: bool, unknown: str
) -> Pieces:
    pieces = Pieces("bert", {})
    for word, number in vocabulary.items():
        special = word.startswith("[") and word.endswith("]")
        kind = TokenKind.UNKNOWN if word == unknown else TokenKind.NORMAL
        text = word if special else word.removeprefix(_CONTINUED)
        if not special and text == word:
            text = SPACE + word
        pieces.tokens[files.number(word, number)] = Token(text, kind)
    pieces.metadata["tokenizer.ggml.normalizer.lowercase"] = flag(lowercase)
    pieces.metadata["tokenizer.ggml.normalizer.strip_accents"] = flag(accents)
    pieces.metadata["tokenizer.ggml.add_sep_token"] = flag(True)
    pieces.specials = {
        "bos": "[CLS]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]",
        "unk": unknown,
    }  # fmt: skip
    pieces.around = (True, False)
    if accents:
        pieces.notes.append(
            "the tokenizer takes accents away, llama.cpp all combining marks, so vowel signs of "
            "Indic scripts too"
        )
    return pieces
