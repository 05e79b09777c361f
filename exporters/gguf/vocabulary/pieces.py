"""SentencePiece, from its own file or from a tokenizer.json: merged by score (BPE), or Unigram.

llama.cpp merges any two neighbours whose union is a token, the best score first. A tokenizer.json
lists which neighbours may be merged, in order; the two are the same where the list is complete and
sorted by what comes out, as it is where SentencePiece made it. That is checked here.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from exporters.gguf.metadata import flag, i8s
from exporters.gguf.vocabulary.base import SPACE, Files, Pieces, Token, TokenKind, single_steps

__all__ = ["read_merged_pieces", "read_sentencepiece", "read_unigram"]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNIGRAM, _BPE = 1, 2
_WORST = -1e4
_AT_SPACES = ({"String": " "}, {"Regex": " "})


def read_merged_pieces(
    files: Files, tokenizer: Mapping[str, Any], model: Mapping[str, Any]
) -> Pieces:
    """BPE over characters with a fall-back to bytes, out of a tokenizer.json (Llama 2, Gemma).

    Raises:
        PackError: llama.cpp has no equal of a part of it.
    """
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            files.refuse(f"its tokenizer.json sets '{key}', which llama.cpp has no equal of")
    vocabulary: Mapping[str, int] = model["vocab"]
    prefix, cut = _spaces(files, tokenizer)
    inside = next((token for token in vocabulary if SPACE in token[1:]), None)
    if cut and inside is not None:
        files.refuse(
            f"its tokenizer.json cuts text at spaces, while its token {inside!r} goes over one; "
            "llama.cpp does not cut",
            "Set 'split' of its Metaspace to false, if the vocabulary was made so.",
        )
    added = {str(entry.get("content")) for entry in tokenizer.get("added_tokens") or []}
    scores = _scores(files, model, vocabulary, added)
    pieces = Pieces("llama", {}, scored=True, prefixed=prefix)
    unknown = model.get("unk_token")
    for token, number in vocabulary.items():
        kind = TokenKind.NORMAL
        if token == unknown:
            kind = TokenKind.UNKNOWN
        elif _BYTE.fullmatch(token):
            kind = TokenKind.BYTE
        place = files.number(token, number)
        pieces.tokens[place] = Token(token, kind, scores.get(token, _WORST))
    if unknown in vocabulary:
        pieces.specials["unk"] = str(unknown)
    if prefix:
        pieces.notes += _notes_of_prefix(tokenizer)
    _need_bytes(files, pieces)
    pieces.metadata["tokenizer.ggml.add_space_prefix"] = flag(prefix)
    return pieces


def _notes_of_prefix(tokenizer: Mapping[str, Any]) -> list[str]:
    """Where llama.cpp puts a space and Metaspace does not; Prepend is as llama.cpp."""
    schemes = [
        step.get("prepend_scheme", "always")
        for step in single_steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
        if step.get("type") == "Metaspace"
    ]
    if not schemes:
        return []
    after = " and before text after a special token" if "first" in schemes else ""
    where = f"before text that begins with one{after}"
    return [f"llama.cpp puts a space also {where}, which the tokenizer does not"]


_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that UTF-8 does not have."""


def _need_bytes(files: Files, pieces: Pieces) -> None:
    """Every byte that may be left over must have a token; that of an ASCII letter may be itself."""
    texts = {token.text for token in pieces.tokens.values()}
    missing = [
        f"<0x{byte:02X}>"
        for byte in range(256)
        if f"<0x{byte:02X}>" not in texts
        and byte not in _NEVER
        and not (byte < 0x80 and chr(byte) in texts)
    ]
    if missing:
        files.refuse(
            f"its tokenizer lacks {len(missing)} tokens for single bytes, such as {missing[0]!r}, "
            "which llama.cpp needs for text that no other token fits",
            "Train the tokenizer with byte_fallback.",
        )


def _scores(
    files: Files, model: Mapping[str, Any], vocabulary: Mapping[str, int], added: Collection[str]
) -> dict[str, float]:
    """Scores that merge in the order of the list.

    Raises:
        PackError: No scores do that.
    """
    ranks: dict[str, int] = {}
    pairs: set[tuple[str, str]] = set()
    last = ""
    for merge in model.get("merges") or []:
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            files.refuse(f"its merge {merge!r:.60} is no pair of tokens")
        first, second = str(pair[0]), str(pair[1])
        whole = first + second
        if whole in ranks and whole != last:
            _incomplete(files, f"makes {whole!r} at different places of its list of merges")
        ranks.setdefault(whole, len(ranks))
        pairs.add((first, second))
        last = whole
    for token in ranks:
        for at in range(1, len(token)):
            pair = (token[:at], token[at:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in pairs:
                _incomplete(files, f"makes {token!r} of other parts than {pair[0]!r} + {pair[1]!r}")
    merged = (token for token in vocabulary if token not in added)  # others are found before
    lone = next((token for token in merged if _is_unmade(token, ranks, vocabulary)), None)
    if lone is not None:
        _incomplete(files, f"has the token {lone!r}, which no merge makes")
    return {token: -float(rank) for token, rank in ranks.items()}


def _is_unmade(token: str, ranks: Mapping[str, int], vocabulary: Mapping[str, int]) -> bool:
    """Whether llama.cpp would merge to a token that the tokenizer does not merge to."""
    special = _BYTE.fullmatch(token) or (token.startswith("<") and token.endswith(">"))
    if len(token) < 2 or token in ranks or special:
        return False
    return any(token[:at] in vocabulary and token[at:] in vocabulary for at in range(1, len(token)))


def _incomplete(files: Files, what: str) -> None:
    files.refuse(
        f"its tokenizer.json {what}; llama.cpp merges whatever gives a token, by one order",
        "Give the tokenizer.model of SentencePiece, or a byte-level BPE tokenizer.",
    )


def _spaces(files: Files, tokenizer: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a space is put before a text, and whether text is cut at spaces."""
    prefix = replaced = cut = False
    for step in single_steps(tokenizer.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "}:
            replaced = True
        else:
            files.refuse(
                f"its tokenizer.json normalises text by {kind}, which llama.cpp does not do for "
                "such a vocabulary"
            )
    for step in single_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "")
            prefix |= scheme in ("always", "first")
            cut |= bool(step.get("split", True))
            replaced = True
        elif kind == "Split" and step.get("pattern") in _AT_SPACES and replaced:
            continue  # no space is left to cut at
        else:
            files.refuse(
                f"its tokenizer.json cuts text by {kind}, which llama.cpp does not do for such a "
                "vocabulary"
            )
    if not replaced:
        files.refuse(
            f"its tokenizer.json does not write spaces as {SPACE!r}; llama.cpp does so for such a "
            "vocabulary"
        )
    return prefix, cut


def read_unigram(files: Files, tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> Pieces:
    """Unigram out of a tokenizer.json (T5 and what was made like it).

    Raises:
        PackError: llama.cpp has no equal of a part of it.
    """
    if model.get("byte_fallback"):
        files.refuse(
            "its Unigram tokenizer falls back to bytes, which llama.cpp does not do for Unigram"
        )
    pieces = Pieces("t5", {}, scored=True)
    unknown = model.get("unk_id")
    for number, entry in enumerate(model["vocab"]):
        token, score = entry
        kind = TokenKind.UNKNOWN if number == unknown else TokenKind.NORMAL
        pieces.tokens[number] = Token(str(token), kind, float(score))
    if unknown not in pieces.tokens:
        files.refuse("its Unigram tokenizer has no token for what it does not know ('unk_id')")
    pieces.specials["unk"] = pieces.tokens[unknown].text
    prefix, squeeze = False, False
    for step in single_steps(tokenizer.get("normalizer"), "normalizers"):
        what = step.get("type")
        if what == "Precompiled" and step.get("precompiled_charsmap"):
            raw = base64.b64decode(step["precompiled_charsmap"])
            pieces.metadata["tokenizer.ggml.precompiled_charsmap"] = i8s(raw)
            pieces.notes.append(
                "the tokenizer normalises letters with their combining marks, llama.cpp (as "
                "SentencePiece) without; text with such marks may get other tokens"
            )
        elif what == "Replace" and step.get("pattern") == {"Regex": " {2,}"}:
            squeeze = True
        elif what != "Strip":
            files.refuse(
                f"its tokenizer.json normalises text by {what}, which llama.cpp does not do"
            )
    for step in single_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        what = step.get("type")
        if what == "WhitespaceSplit":
            squeeze = True
        elif what == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "")
            prefix |= scheme in ("always", "first")
        else:
            files.refuse(f"its tokenizer.json cuts text by {what}, which llama.cpp does not do")
    pieces.metadata["tokenizer.ggml.add_space_prefix"] = flag(prefix)
    pieces.metadata["tokenizer.ggml.remove_extra_whitespaces"] = flag(squeeze)
    return pieces


def read_sentencepiece(files: Files, name: str) -> Pieces:
    """SentencePiece's own file.

    The protocol buffer is read field by field; source of the numbers: sentencepiece_model.proto.

    Raises:
        PackError: The file is broken, or llama.cpp has no equal of a part of it.
    """
    raw = files.contents[name]
    tokens: dict[int, Token] = {}
    kind, normalizer, bytes_too = _UNIGRAM, b"", False
    try:
        for number, value in _fields(raw):
            if number == 1:
                tokens[len(tokens)] = _piece(bytes(value))
            elif number == 2:
                trainer = dict(_fields(bytes(value)))
                kind = int(trainer.get(3, _UNIGRAM))
                bytes_too = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = bytes(value)
        settings = dict(_fields(normalizer))
    except (ValueError, IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        files.refuse(f"{name} is no model of SentencePiece ({error})", "Copy it again.")
    if not tokens:
        files.refuse(f"{name} holds no tokens", "Copy it again.")
    charsmap = bytes(settings.get(2, b""))
    prefix, squeeze = bool(settings.get(3, 1)), bool(settings.get(4, 1))
    if kind == _BPE:
        pieces = Pieces("llama", tokens, scored=True)
        if charsmap:
            files.refuse(
                f"{name} normalises characters ({bytes(settings.get(1, b'')).decode()}), which "
                "llama.cpp does not do for such a vocabulary"
            )
        _need_bytes(files, pieces)
    elif kind == _UNIGRAM:
        if bytes_too:
            files.refuse(f"{name} is Unigram with a fall-back to bytes, which llama.cpp has not")
        pieces = Pieces("t5", tokens, scored=True)
        if charsmap:
            pieces.metadata["tokenizer.ggml.precompiled_charsmap"] = i8s(charsmap)
        pieces.metadata["tokenizer.ggml.remove_extra_whitespaces"] = flag(squeeze)
    else:
        files.refuse(f"{name} is of a kind that llama.cpp has no equal of ({kind})")
    pieces.metadata["tokenizer.ggml.add_space_prefix"] = flag(prefix)
    controls = [token.text for token in tokens.values() if token.kind is TokenKind.CONTROL]
    unknown = [token.text for token in tokens.values() if token.kind is TokenKind.UNKNOWN]
    for role, text in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        if text in controls:
            pieces.specials[role] = text
    if unknown:
        pieces.specials["unk"] = unknown[0]
    return pieces


def _piece(raw: bytes) -> Token:
    fields = dict(_fields(raw))
    score = struct.unpack("<f", bytes(fields[2]))[0] if 2 in fields else 0.0
    return Token(bytes(fields[1]).decode(), TokenKind(int(fields.get(3, 1))), score)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: integers, or bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(raw):
            raise ValueError("it is cut off")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has no end")
