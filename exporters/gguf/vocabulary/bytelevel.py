"""Byte-level BPE (GPT-2, Llama 3, Qwen, …): text is cut by expressions, bytes merged by rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporters.gguf.metadata import text, texts
from exporters.gguf.vocabulary.base import Files, Pieces, Token, single_steps
from exporters.gguf.vocabulary.merging import Merging
from exporters.gguf.vocabulary.pretokenizers import find_pretokenizer

__all__ = ["read_byte_level"]


def read_byte_level(files: Files, tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> Pieces:
    """Read the vocabulary of a tokenizer.json.

    Raises:
        PackError: llama.cpp has no equal of a part of it.
    """
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            files.refuse(f"its tokenizer.json sets '{key}', which llama.cpp has no equal of")
    if not model.get("merges"):
        files.refuse("its tokenizer.json has no merges", "Convert it with its merges.")
    pieces = Pieces("gpt2", {})
    steps = single_steps(tokenizer.get("normalizer"), "normalizers")
    other = sorted({str(step.get("type")) for step in steps} - {"NFC"})
    if other:
        files.refuse(
            f"its tokenizer.json normalises text by {', '.join(other)}, which llama.cpp does not do"
        )
    if steps:
        pieces.notes.append(
            "the tokenizer composes characters (NFC), llama.cpp does not; "
            "text that is not composed gets other tokens"
        )
    merges = [_pair(files, merge) for merge in model["merges"]]
    added = {str(entry.get("content")) for entry in tokenizer.get("added_tokens") or []}
    merging = Merging(model["vocab"], merges, bool(model.get("ignore_merges")), added)
    pre, notes = find_pretokenizer(tokenizer.get("pre_tokenizer"), merging, files.label)
    pieces.notes += notes
    for token, number in model["vocab"].items():
        pieces.tokens[files.number(token, number)] = Token(token)
    pieces.metadata["tokenizer.ggml.pre"] = text(pre)
    pieces.metadata["tokenizer.ggml.merges"] = texts(f"{a} {b}" for a, b in merges)
    return pieces


def _pair(files: Files, merge: Any) -> tuple[str, str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or " " in "".join(map(str, pair)):
        files.refuse(f"its merge {merge!r:.60} is no pair of byte-level tokens")
    return str(pair[0]), str(pair[1])
