"""The vocabulary of a GGUF file, from a model's tokenizer files.

The files are read as data, without the libraries that run them. What they say a tokenizer does is
looked up part by part; a part that llama.cpp has no equal of is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporters.gguf.metadata import Metadata, Value, f32s, flag, i32s, text, texts, u32
from exporters.gguf.vocabulary.base import Files, Pieces, Token, TokenKind, single_steps
from exporters.gguf.vocabulary.bytelevel import read_byte_level
from exporters.gguf.vocabulary.pieces import read_merged_pieces, read_sentencepiece, read_unigram
from exporters.gguf.vocabulary.wordpiece import read_word_list, read_wordpiece

__all__ = ["Vocabulary", "no_vocabulary", "read_vocabulary"]

_PIECE_FILES = ("tokenizer.model", "spiece.model")
_SHIFTED = "sentencepiece.bpe.model"
_ROLES = ("bos", "eos", "unk", "pad", "sep", "mask", "cls")
_KEYS = {"unk": "unknown", "pad": "padding", "sep": "seperator"}
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<EOT>")
_FIM = {
    "fim_pre": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<PRE>", "▁<PRE>"),
    "fim_suf": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<SUF>", "▁<SUF>"),
    "fim_mid": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<MID>", "▁<MID>"),
    "fim_pad": ("<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
}
_DEFAULT_END = {"gpt2": 11, "llama": 2, "t5": 1}
"""The token at which llama.cpp ends texts of a kind of vocabulary that does not name it."""
_WORST = -1e4


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary.

    Attributes:
        metadata: As it stands in the file.
        notes: What the user should know of it.
    """

    metadata: Metadata
    notes: Sequence[str] = ()


def no_vocabulary() -> Vocabulary:
    """For a file that is given token ids by whoever runs it."""
    return Vocabulary({"tokenizer.ggml.model": text("no_vocab")})


def read_vocabulary(
    contents: Mapping[str, bytes], rows: int, config: Mapping[str, object], label: str
) -> Vocabulary:
    """Read a model's vocabulary.

    Args:
        contents: Of the small files beside the weights, by name.
        rows: Of the embedding; ids without a token are filled with unused ones.
        config: Contents of the model's config.json.
        label: How the user named the model.

    Raises:
        PackError: There is none, or llama.cpp has no equal of a part of it.
    """
    return _Reader(Files(contents, label), config).read(rows)


class _Reader:
    """Reads one vocabulary; keeps what its parts share."""

    def __init__(self, files: Files, config: Mapping[str, object]) -> None:
        self._files = files
        self._tokenizer = files.json("tokenizer.json") or self._of_gpt2(files)
        self._settings = files.json("tokenizer_config.json")
        self._config = config
        self._notes: list[str] = []
        self._ids: dict[str, int] = {}

    def read(self, rows: int) -> Vocabulary:
        pieces = self._pieces()
        self._add_tokens(pieces)
        tokens = self._fill(pieces, rows)
        found: dict[str, Value] = {
            "tokenizer.ggml.model": text(pieces.model),
            "tokenizer.ggml.tokens": texts(token.text for token in tokens),
            "tokenizer.ggml.token_type": i32s(int(token.kind) for token in tokens),
        }
        if pieces.scored:
            found["tokenizer.ggml.scores"] = f32s(token.score for token in tokens)
        found |= pieces.metadata
        found |= self._special(pieces)
        found |= self._templates()
        return Vocabulary(found, [*pieces.notes, *self._notes])

    @staticmethod
    def _of_gpt2(files: Files) -> Mapping[str, Any]:
        """The older pair of files of byte-level BPE, as one tokenizer.json would say it."""
        if not {"vocab.json", "merges.txt"} <= files.contents.keys():
            return {}
        lines = files.contents["merges.txt"].decode("utf-8", "replace").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        return {
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "model": {"type": "BPE", "vocab": files.json("vocab.json"), "merges": merges},
        }

    def _pieces(self) -> Pieces:
        """The vocabulary by its kind."""
        files = self._files
        if not self._tokenizer:
            for name in _PIECE_FILES:
                if name in files.contents:
                    return read_sentencepiece(files, name)
            if _SHIFTED in files.contents:
                files.refuse(
                    f"of its tokenizer there is {_SHIFTED} alone, whose ids are not the model's",
                    "Save its tokenizer.json: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
                )
            if "vocab.txt" in files.contents:
                return read_word_list(files, "vocab.txt")
            files.refuse(
                "has no tokenizer (tokenizer.json, tokenizer.model or vocab.txt)",
                "Copy the tokenizer's files of the model that it was trained from beside it.",
            )
        model = self._tokenizer.get("model")
        if not isinstance(model, Mapping) or not model.get("vocab"):
            files.refuse("its tokenizer.json has no vocabulary", "Download the file again.")
        kind = model.get("type", "BPE")
        steps = single_steps(self._tokenizer.get("pre_tokenizer"), "pretokenizers")
        byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        if kind == "BPE" and (byte_level or not model.get("byte_fallback")):
            return read_byte_level(files, self._tokenizer, model)
        readers = {"BPE": read_merged_pieces, "Unigram": read_unigram, "WordPiece": read_wordpiece}
        if kind not in readers:
            files.refuse(
                f"its tokenizer is of the kind {kind}, which llama.cpp has no equal of",
                "Known kinds: BPE, Unigram and WordPiece.",
            )
        return readers[kind](files, self._tokenizer, model)

    def _add_tokens(self, pieces: Pieces) -> None:
        """Put in what was added to the vocabulary: special tokens and others."""
        spaced, stripped = [], []
        for added in self._added():
            token, number = str(added.get("content")), added.get("id")
            special = bool(added.get("special"))
            place = self._files.number(token, number)
            kind = TokenKind.CONTROL if special else TokenKind.USER_DEFINED
            held = pieces.tokens.get(place)
            if held is not None and held.kind in (TokenKind.UNKNOWN, TokenKind.BYTE):
                kind = held.kind
            pieces.tokens[place] = Token(token, kind, held.score if held else 0.0)
            if pieces.prefixed and not special and added.get("normalized", True):
                spaced.append(token)
            if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
                stripped.append(token)
        self._mark_named(pieces)
        if spaced:
            self._notes.append(
                f"llama.cpp puts a space between {_listed(spaced)} and what follows, which the "
                "tokenizer does not"
            )
        if stripped:
            self._notes.append(
                f"the tokenizer takes the spaces beside {_listed(stripped)} away, or finds it as a "
                "whole word only; llama.cpp does not (but for spaces after it, where the model's "
                "name contains phi-3)"
            )

    def _mark_named(self, pieces: Pieces) -> None:
        """Mark as special what is named as such, as transformers does when it loads a tokenizer."""
        named = {self._name_of(role) or pieces.specials.get(role) for role in _ROLES}
        for number, token in pieces.tokens.items():
            if token.text in named and token.kind is TokenKind.NORMAL:
                pieces.tokens[number] = replace(token, kind=TokenKind.CONTROL)

    def _added(self) -> list[Mapping[str, Any]]:
        if self._tokenizer.get("added_tokens") is not None:
            return list(self._tokenizer["added_tokens"])
        decoder = self._settings.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            return [{**entry, "id": int(number)} for number, entry in decoder.items()]
        names = {self._name_of(role) for role in _ROLES}
        return [
            {"content": token, "id": number, "special": token in names}
            for token, number in self._files.json("added_tokens.json").items()
        ]

    def _fill(self, pieces: Pieces, rows: int) -> list[Token]:
        """A token for every row of the embedding."""
        if max(pieces.tokens) >= rows:
            self._files.refuse(
                f"its tokenizer has ids up to {max(pieces.tokens)}, its embedding has {rows} rows",
                "Give the tokenizer that belongs to the weights, or resize the embeddings.",
            )
        tokens: list[Token] = []
        for number in range(rows):
            token = pieces.tokens.get(number)
            if token is None:
                token = Token(f"[PAD{number}]", TokenKind.UNUSED, _WORST)
            if token.text in self._ids or not token.text:
                token = self._renamed(token, number)
            self._ids[token.text] = number
            tokens.append(token)
        return tokens

    def _renamed(self, token: Token, number: int) -> Token:
        """A token that llama.cpp could not tell from another one; only unused ones may be that."""
        if not token.text:
            self._files.refuse(f"its token {number} is empty", "llama.cpp wants every token once.")
        if token.kind is not TokenKind.UNUSED:
            self._files.refuse(
                f"its tokens {self._ids[token.text]} and {number} are both {token.text!r}",
                "llama.cpp wants every token once.",
            )
        return replace(token, text=f"[PAD{number}]'")

    def _special(self, pieces: Pieces) -> dict[str, Value]:
        """Ids of special tokens, and which of them stand around every text."""
        found: dict[str, int] = {}
        for role in _ROLES:
            number = self._id_of(role, pieces)
            if number is not None:
                found[role] = number
        if pieces.model == "bert":
            self._frame(found)
        found |= self._turn_ends(found)
        for role, names in _FIM.items():
            held = next((self._ids[name] for name in names if name in self._ids), None)
            if held is not None:
                found[role] = held
        if "eos" not in found and pieces.model != "bert":
            found |= self._ending(pieces)
        values = {
            f"tokenizer.ggml.{_KEYS.get(role, role)}_token_id": u32(number)
            for role, number in found.items()
        }
        before, after = pieces.around or self._around(found)
        for wanted, role in ((before, "bos"), (after, "eos")):
            if wanted and role not in found:
                self._files.refuse(
                    f"its tokenizer puts a token ({role}) around every text that it does not name",
                    f"Name '{role}_token' in tokenizer_config.json.",
                )
        values["tokenizer.ggml.add_bos_token"] = flag(before)
        values["tokenizer.ggml.add_eos_token"] = flag(after)
        return values

    def _frame(self, found: dict[str, int]) -> None:
        """What llama.cpp takes fixed ids for where BERT's tokenizer does not name it."""
        found.pop("eos", None)
        if "cls" in found:
            found["bos"] = found["cls"]
        for role, token in (("bos", "[CLS]"), ("sep", "[SEP]"), ("unk", "[UNK]")):
            if role not in found:
                self._files.refuse(
                    f"its WordPiece tokenizer has no token '{token}', without which llama.cpp "
                    "tokenizes nothing",
                    "Name cls_token, sep_token and unk_token in tokenizer_config.json.",
                )

    def _ending(self, pieces: Pieces) -> dict[str, int]:
        """What ends a text where the tokenizer does not say: llama.cpp would take a fixed id."""
        unused = next((n for n in self._ids.values() if n not in pieces.tokens), None)
        self._notes.append("the tokenizer does not say which token ends a text")
        if unused is None:
            number = _DEFAULT_END[pieces.model]
            if number < len(self._ids):
                token = next(token for token, held in self._ids.items() if held == number)
                self._notes.append(f"llama.cpp ends texts at token {number}, {token!r}, therefore")
            return {}
        return {"eos": unused}

    def _turn_ends(self, found: Mapping[str, int]) -> dict[str, int]:
        """The token that ends a turn: a second one that ends generation, if the model has some."""
        ends = self._files.json("generation_config.json").get("eos_token_id")
        every = [n for n in ends if isinstance(n, int)] if isinstance(ends, list) else []
        named = [n for n in every if n != found.get("eos") and 0 <= n < len(self._ids)]
        if not named:
            return {}
        texts_of = {number: token for token, number in self._ids.items()}
        known = [n for n in named if texts_of[n] in _TURN_ENDS]
        return {"eot": (known or named)[0]}

    def _name_of(self, role: str) -> str | None:
        named = self._settings.get(f"{role}_token")
        if named is None:
            named = self._files.json("special_tokens_map.json").get(f"{role}_token")
        content = named.get("content") if isinstance(named, Mapping) else named
        return content if isinstance(content, str) else None

    def _id_of(self, role: str, pieces: Pieces) -> int | None:
        for content in (self._name_of(role), pieces.specials.get(role)):
            if content is not None and content in self._ids:
                return self._ids[content]
        number = self._config.get(f"{role}_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if (
            isinstance(number, int)
            and not isinstance(number, bool)
            and 0 <= number < len(self._ids)
        ):
            return number
        return None

    def _around(self, special: Mapping[str, int]) -> tuple[bool, bool]:
        """Whether the tokenizer puts the first and the last token around a text."""
        parts = single_steps(self._tokenizer.get("post_processor"), "processors")
        templates = [p for p in parts if p.get("type") == "TemplateProcessing"]
        other = [p.get("type") for p in parts if p.get("type") not in _PROCESSORS]
        if other or len(templates) > 1:
            self._files.refuse(
                f"its tokenizer.json adds tokens by {other}, which is not known here"
            )
        if not templates:
            # SentencePiece by itself begins texts; without a token for that (T5), it ends them.
            begins = not self._tokenizer and "bos" in special
            ends = not self._tokenizer and "bos" not in special and "eos" in special
            before = self._settings.get("add_bos_token")
            after = self._settings.get("add_eos_token")
            return (
                begins if before is None else bool(before),
                ends if after is None else bool(after),
            )
        single = [
            str(entry["SpecialToken"]["id"]) if "SpecialToken" in entry else ""
            for entry in templates[0].get("single", [])
        ]
        at = single.index("") if "" in single else 0
        first = [self._ids.get(token) for token in single[:at]]
        last = [self._ids.get(token) for token in single[at + 1 :]]
        if first not in ([], [special.get("bos")]) or last not in ([], [special.get("eos")]):
            self._files.refuse(
                f"its tokenizer.json puts {single} around a text; llama.cpp adds the tokens that "
                "begin and end a text only"
            )
        return bool(first), bool(last)

    def _templates(self) -> dict[str, Value]:
        """The chat template, and others by their names."""
        given = self._settings.get("chat_template")
        templates: dict[str, str] = {}
        if isinstance(given, str):
            templates["default"] = given
        elif isinstance(given, list):
            templates = {str(t.get("name")): str(t.get("template")) for t in given}
        for name, content in sorted(self._files.contents.items()):
            if name == "chat_template.jinja":
                templates["default"] = content.decode("utf-8", "replace")
            elif name.startswith("additional_chat_templates/") and name.endswith(".jinja"):
                templates[Path(name).stem] = content.decode("utf-8", "replace")
        values: dict[str, Value] = {}
        others = sorted(templates.keys() - {"default"})
        if "default" in templates:
            values["tokenizer.chat_template"] = text(templates["default"])
        if others:
            values["tokenizer.chat_templates"] = texts(others)
        for name in others:
            safe = re.sub(r"[^a-z0-9_]+", "_", name.lower())
            values[f"tokenizer.chat_template.{safe}"] = text(templates[name])
        return values


_PROCESSORS = ("ByteLevel", "TemplateProcessing")


def _listed(tokens: Sequence[str]) -> str:
    """Some tokens by name, the others by count."""
    shown = ", ".join(repr(token) for token in tokens[:3])
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    return f"{'the tokens' if len(tokens) > 1 else 'the token'} {shown}{more}"
