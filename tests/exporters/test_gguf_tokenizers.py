"""Tokenizers in GGUF: llama.cpp gives the ids of transformers on difficult texts."""

from __future__ import annotations

import io
import json
import pydoc_data.topics
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from exporters.gguf.difficult import TEXTS
from exporters.gguf.vocabulary import read_vocabulary
from mergekit_lite.errors import PackError
from mergekit_lite.merge.model import small_files_of
from tests import llama_cpp

SPECIAL = ["<unk>", "<s>", "</s>", "<|eot|>"]
SIZE = 1200
HARD = (
    *(text for text in TEXTS if text),
    "<s>inside</s> a text<|eot|>, and <|eot|><|eot|>",
    "I'M you'Re WE'LL 'tis don't DON'T o'clock",
    "1 12 123 1234 12345 123456 １２３ ٤٥٦ ½ ²",
    "word " * 40,
    "x" * 200,
    "\t\tif (a==b){return\n\n\n}\n  \n",
    "a\u0301e\u0308 n\u0303 \u0915\u094d\u0937 \u0e01\u0e49",
    "".join(chr(c) for c in range(0x21, 0x7F)),
    "".join(chr(c) for c in range(0xA1, 0x180)),
)
_BY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(expression: str) -> Any:
    return pre_tokenizers.Split(Regex(expression), "isolated")


CUTS: dict[str, Any] = {
    "gpt-2": _GPT2,
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama 3": pre_tokenizers.Sequence([_split(rf"{_BY_CASE}|\p{{N}}{{1,3}}{_REST}"), _BYTES]),
    "qwen2": pre_tokenizers.Sequence([_split(rf"{_BY_CASE}|\p{{N}}{_REST}"), _BYTES]),
    "falcon": pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("contiguous"), _GPT2, _split("[0-9][0-9][0-9]"),
    ]),
}  # fmt: skip
IGNORES_MERGES = ("llama 3",)


def text() -> list[str]:
    """Some text to train on: English, code, and names of characters with the characters."""
    topics = list(pydoc_data.topics.topics.values())[:30]
    letters = [c for c in map(chr, range(0xA0, 0x3000)) if unicodedata.category(c)[0] == "L"]
    names = [f"{c}{c} {unicodedata.name(c, '').lower()}" for c in letters[::7]]
    return [*topics, *names]


def _save(folder: Path, tokenizer: Tokenizer, **keys: Any) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **keys})
    fast.save_pretrained(folder)
    return folder


def _model(folder: Path, rows: int = SIZE) -> Path:
    """A tiny Llama around a tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
        vocab_size=rows, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _compare(
    folder: Path, name: str, record: Callable[[str, str], None], lines: Sequence[str] = HARD
) -> list[str]:
    """The texts that llama.cpp tokenizes otherwise."""
    _model(folder)
    llama_cpp.write_gguf(folder, folder / "model.gguf", vocabulary=True)
    found = llama_cpp.tokens_of(folder / "model.gguf", lines)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [theirs(line)["input_ids"] for line in lines]
    wrong = [t for t, a, b in zip(lines, found, expected, strict=True) if a != list(b)]
    record("tokenizers", f"{name}\t{len(lines) - len(wrong)} of {len(lines)}")
    for line, a, b in zip(lines, found, expected, strict=True):
        if a != list(b):
            print(repr(line)[:80], a[:12], list(b)[:12])
    return wrong


@pytest.mark.parametrize("name", CUTS)
def test_byte_level(tmp_path: Path, name: str, record_property: Callable[[str, str], None]) -> None:
    ignores = name in IGNORES_MERGES
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores))
    tokenizer.pre_tokenizer = CUTS[name]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text(), trainers.BpeTrainer(
        vocab_size=SIZE - 5, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    _save(tmp_path, tokenizer)
    assert _compare(tmp_path, f"byte-level BPE, cut as {name}", record_property) == []


def _train_pieces(folder: Path, kind: str, **keys: Any) -> Path:
    """SentencePiece's own trainer."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for part in text() for line in part.splitlines() if line),
        model_writer=made, model_type=kind, vocab_size=SIZE - 5, minloglevel=2,
        user_defined_symbols=["<|eot|>"], hard_vocab_limit=False, **keys,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return folder


def test_sentencepiece_merged(tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    """The file of SentencePiece alone, against SentencePiece itself (Llama 2)."""
    _train_pieces(tmp_path, "bpe", byte_fallback=True, normalization_rule_name="identity",
                  remove_extra_whitespaces=False)  # fmt: skip
    _model(tmp_path)
    llama_cpp.write_gguf(tmp_path, tmp_path / "model.gguf", vocabulary=True)
    lines = [line for line in HARD if "<s>" not in line and "<|" not in line]
    found = llama_cpp.tokens_of(tmp_path / "model.gguf", lines)
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    expected = [[theirs.bos_id(), *theirs.encode(line)] for line in lines]
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    record_property("tokenizers", f"SentencePiece BPE, tokenizer.model\t{same} of {len(lines)}")
    assert found == expected


@pytest.mark.parametrize("prefix", [True, False])
def test_merged_pieces_of_tokenizer_json(
    tmp_path: Path, prefix: bool, record_property: Callable[[str, str], None]
) -> None:
    """As transformers converts SentencePiece: a space before texts (Llama 2), or none (Gemma)."""
    _train_pieces(tmp_path, "bpe", byte_fallback=True, normalization_rule_name="identity",
                  remove_extra_whitespaces=False, add_dummy_prefix=prefix)  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer.model").unlink()
    vocabulary = {processor.id_to_piece(i): i for i in range(len(processor))}
    merges = []
    for token in sorted(vocabulary, key=lambda t: -processor.get_score(vocabulary[t])):
        if processor.is_control(vocabulary[token]) or token.startswith("<"):
            continue
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [p for p in parts if p[0] in vocabulary and p[1] in vocabulary]
    tokenizer = Tokenizer(models.BPE(
        vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    ))  # fmt: skip
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<|eot|>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    _save(tmp_path, tokenizer)
    name = f"BPE with bytes, tokenizer.json, {'a' if prefix else 'no'} space before"
    assert _compare(tmp_path, name, record_property) == []


def test_unigram(tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    """The file of SentencePiece alone, against SentencePiece itself (T5)."""
    _train_pieces(tmp_path, "unigram", normalization_rule_name="nmt_nfkc")
    _model(tmp_path)
    llama_cpp.write_gguf(tmp_path, tmp_path / "model.gguf", vocabulary=True)
    lines = [line for line in HARD if "<s>" not in line and "<|" not in line]
    found = llama_cpp.tokens_of(tmp_path / "model.gguf", lines)
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    expected = [[theirs.bos_id(), *theirs.encode(line)] for line in lines]
    wrong = [t for t, a, b in zip(lines, found, expected, strict=True) if a != b]
    for t, a, b in zip(lines, found, expected, strict=True):
        if a != b:
            print(repr(t)[:60], a[:14], b[:14])
    count = f"{len(lines) - len(wrong)} of {len(lines)}"
    record_property("tokenizers", f"SentencePiece Unigram, tokenizer.model\t{count}")
    assert wrong == []


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece(
    tmp_path: Path, lowercase: bool, record_property: Callable[[str, str], None]
) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(text(), trainers.WordPieceTrainer(
        vocab_size=SIZE - 3, special_tokens=special, show_progress=False,
        limit_alphabet=500,
    ))  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    _save(
        tmp_path, tokenizer, bos_token=None, eos_token=None, unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]",
    )  # fmt: skip
    name = f"WordPiece, {'lower' if lowercase else 'both'} case"
    words = [line for line in HARD if max(map(len, line.split()), default=0) <= 100]
    assert _compare(tmp_path, name, record_property, words) == []


def _files(**parts: Any) -> dict[str, bytes]:
    """A small byte-level tokenizer.json, with parts of it replaced."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"ab": 256}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]}
    document = {
        "model": {**model, **parts.pop("model", {})},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": 257, "content": "<end>", "special": True}],
        **parts,
    }
    return {"tokenizer.json": json.dumps(document).encode()}


def test_padding() -> None:
    """Rows of the embedding without a token are unused ones; more tokens than rows are an error."""
    found = read_vocabulary(_files(), 300, {"eos_token_id": 257}, "m").metadata
    tokens = found["tokenizer.ggml.tokens"].content
    kinds = found["tokenizer.ggml.token_type"].content
    assert tokens[256:260] == ("ab", "<end>", "[PAD258]", "[PAD259]")
    assert kinds[256:260] == (1, 3, 5, 5)
    with pytest.raises(PackError, match="ids up to 257, its embedding has 200 rows"):
        read_vocabulary(_files(), 200, {}, "m")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": {"merges": []}}, "has no merges"),
        ({"model": {"vocab": {}}}, "has no vocabulary"),
        ({"model": {"type": "WordLevel"}}, "of the kind WordLevel"),
        ({"model": {"dropout": 0.1}}, "sets 'dropout'"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "a space before"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False}]}}, r"no equal of: Split \\d"),
        ({"added_tokens": [{"id": 3, "content": "ab"}]}, "are both 'ab'"),
        ({"added_tokens": [{"id": None, "content": "x"}]}, "'x' has no id"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<end>"}}, {"Sequence": {"id": "A"}},
            {"SpecialToken": {"id": "<end>"}}]}}, "puts .* around a text"),
    ],
)  # fmt: skip
def test_what_has_no_equal(parts: dict[str, Any], message: str) -> None:
    """One error each, which names the part."""
    with pytest.raises(PackError, match=message):
        read_vocabulary(_files(**parts), 300, {"bos_token_id": 5}, "m")


def test_broken_files() -> None:
    with pytest.raises(PackError, match=r"has no tokenizer \("):
        read_vocabulary({}, 10, {}, "m")
    with pytest.raises(PackError, match="not valid JSON"):
        read_vocabulary({"tokenizer.json": b"{"}, 10, {}, "m")
    raw = bytes(np.random.default_rng(0).integers(0, 256, 200).astype(np.uint8))
    for end in (0, 1, 7, 50, 200):
        with pytest.raises(PackError):
            read_vocabulary({"tokenizer.model": raw[:end]}, 10, {}, "m")


def test_the_examples_tokenizer(example_models: Path) -> None:
    """All parts that the example models' tokenizer has."""
    found = read_vocabulary(small_files_of(example_models / "base"), 2048, {}, "base").metadata
    assert found["tokenizer.ggml.pre"].content == "gpt-2"
    assert "tokenizer.chat_template" in found
