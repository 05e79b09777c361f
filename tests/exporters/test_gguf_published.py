"""Tokenizers as they are published: made by transformers' classes, read from what these save."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from exporters.gguf.vocabulary import Vocabulary, read_vocabulary
from mergekit_lite.errors import PackError
from mergekit_lite.merge.model import small_files_of
from tests.exporters.hard_texts import BY_TOPIC, HARD, random_texts
from tests.exporters.test_gguf_tokenizers import text

pytest.importorskip("xllamacpp")
from tests import llama_cpp

TEXTS = (*HARD, *random_texts(200))
UNMARKED = tuple(t for t in TEXTS if t.isascii())
Record = Callable[[str, str], None]


def _pieces(kind: str, **keys: Any) -> bytes:
    """A model of SentencePiece."""
    made = io.BytesIO()
    lines = [line for part in text() for line in part.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *(t for t in HARD if t.strip())]), model_writer=made,
        model_type=kind, minloglevel=2, vocab_size=1600, hard_vocab_limit=False, **keys,
    )  # fmt: skip
    return made.getvalue()


@pytest.fixture(scope="module")
def llama() -> bytes:
    """As Llama 2 was trained."""
    return _pieces("bpe", byte_fallback=True, split_digits=True, character_coverage=0.999,
                   normalization_rule_name="identity", remove_extra_whitespaces=False)  # fmt: skip


@pytest.fixture(scope="module")
def bytes_merged() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """As GPT-2 was trained."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(text(), trainers.BpeTrainer(
        vocab_size=1500, show_progress=False, special_tokens=["<|endoftext|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def words() -> list[str]:
    """As BERT was trained: the list of pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator([*text(), *HARD], trainers.WordPieceTrainer(
        vocab_size=1500, show_progress=False, limit_alphabet=600,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    ))  # fmt: skip
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=lambda word: vocabulary[word])


def _write(folder: Path, files: Mapping[str, bytes | str], **settings: Any) -> Path:
    for name, content in files.items():
        raw = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(raw)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _saved(tokenizer: Any, folder: Path) -> Path:
    """What transformers saves of it, alone."""
    tokenizer.save_pretrained(folder / "saved")
    return folder / "saved"


def _compare(
    folder: Path, name: str, record: Record, texts: Sequence[str] = TEXTS
) -> tuple[Vocabulary, list[str]]:
    """The vocabulary, and the texts that llama.cpp tokenizes otherwise than transformers."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = read_vocabulary(small_files_of(folder), len(theirs) + 3, {}, name)
    ours = llama_cpp.tokens_by({name: vocabulary.metadata}, texts, folder)[name]
    wrong = [t for t, ids in zip(texts, ours, strict=True) if ids != list(theirs(t)["input_ids"])]
    record("tokenizers", f"{name}\t{len(texts) - len(wrong)} of {len(texts)}")
    return vocabulary, wrong


_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _starts(name: str) -> bool:
    return name.startswith((" ", "\u2581"))


@pytest.mark.parametrize("legacy", [True, False])
def test_llama(tmp_path: Path, llama: bytes, legacy: bool, record_property: Record) -> None:
    """Llama 2, Mistral: transformers puts no second space before text that begins with one."""
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    _write(tmp_path, {"tokenizer.model": llama}, **settings, **_NAMES)
    folder = _saved(transformers.AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    name = f"as saved: {'Llama 2' if legacy else 'Mistral'}"
    vocabulary, wrong = _compare(folder, name, record_property)
    assert all(_starts(text) or "<s>" in text or "</s>" in text for text in wrong)
    assert any("text that begins with one" in note for note in vocabulary.notes)
    assert any("after a special token" in note for note in vocabulary.notes) != legacy


def test_sentencepiece_itself(tmp_path: Path, llama: bytes, record_property: Record) -> None:
    """tokenizer.model is read as SentencePiece reads it, text that begins with a space too."""
    _write(tmp_path, {"tokenizer.model": llama}, **_NAMES)
    texts = [text for text in TEXTS if "<" not in text and "\x00" not in text]
    vocabulary = read_vocabulary(small_files_of(tmp_path), 1600, {}, "m")
    ours = llama_cpp.tokens_by({"": vocabulary.metadata}, texts, tmp_path)[""]
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert ours == [[1, *theirs.encode(text)] for text in texts]
    assert vocabulary.notes == []
    record_property("tokenizers", f"SentencePiece: BPE, hard texts\t{len(texts)} of {len(texts)}")


def test_phi(tmp_path: Path, llama: bytes, record_property: Record) -> None:
    """Phi-3: tokens of turns, which take the spaces behind them; they are told in one note."""
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    _write(tmp_path, {"tokenizer.model": llama}, **settings, **_NAMES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool|>"]
    tokenizer.add_tokens(
        [AddedToken(t, rstrip=True, special=True, normalized=False) for t in turns]
    )
    texts = [text for text in TEXTS if not _starts(text) and "<" not in text]
    vocabulary, wrong = _compare(_saved(tokenizer, tmp_path), "as saved: Phi-3",
                                 record_property, texts)  # fmt: skip
    assert wrong == []
    [note] = [note for note in vocabulary.notes if "spaces beside" in note]
    assert "'<|user|>', '<|assistant|>', '<|system|>' and 2 more" in note


@pytest.mark.parametrize("saved", [True, False])
def test_gemma(tmp_path: Path, saved: bool, record_property: Record) -> None:
    """No space before text, line breaks that are tokens of their own."""
    raw = _pieces("bpe", byte_fallback=True, split_digits=True, character_coverage=0.999,
                  normalization_rule_name="identity", remove_extra_whitespaces=False,
                  add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>",
                  eos_piece="<eos>", user_defined_symbols=["\n\n", "<start_of_turn>"])  # fmt: skip
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    folder = _write(tmp_path, {"tokenizer.model": raw}, tokenizer_class="GemmaTokenizer",
                    add_bos_token=True, **names)  # fmt: skip
    if saved:
        folder = _saved(transformers.AutoTokenizer.from_pretrained(folder), tmp_path)
    name = f"Gemma, {'tokenizer.json' if saved else 'tokenizer.model'}"
    texts = [*TEXTS, "<start_of_turn>user\nHi!\n\n<start_of_turn> a", "<bos>a\n\n\nb"]
    assert _compare(folder, name, record_property, texts)[1] == []


@pytest.mark.parametrize("saved", [True, False])
def test_t5(tmp_path: Path, saved: bool, record_property: Record) -> None:
    """No token begins a text, one ends it."""
    raw = _pieces("unigram", normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2,
                  bos_id=-1)  # fmt: skip
    folder = _write(tmp_path, {"spiece.model": raw}, tokenizer_class="T5Tokenizer",
                    eos_token="</s>", unk_token="<unk>", pad_token="<pad>")  # fmt: skip
    if saved:
        folder = _saved(transformers.AutoTokenizer.from_pretrained(folder), tmp_path)
    name = f"T5, {'tokenizer.json' if saved else 'spiece.model'}"
    vocabulary, wrong = _compare(folder, name, record_property)
    assert not [text for text in wrong if text in UNMARKED]
    assert len(wrong) < 0.05 * len(TEXTS)
    assert any("combining marks" in note for note in vocabulary.notes) == saved


@pytest.mark.parametrize(
    "kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "CohereTokenizer", "GPTNeoXTokenizer"]
)
def test_byte_level(
    tmp_path: Path,
    kind: str,
    bytes_merged: tuple[dict[str, int], list[tuple[str, str]]],
    record_property: Record,
) -> None:
    """All but GPT-2's compose characters, which llama.cpp does not, and the user is told."""
    vocabulary, merges = bytes_merged
    names = {"bos_token": "<s>", "eos_token": "</s>"} if kind == "CohereTokenizer" else {}
    tokenizer = getattr(transformers, kind)(vocab=vocabulary, merges=merges, **names)
    name = f"as saved: {kind.removesuffix('Tokenizer')}"
    found, wrong = _compare(_saved(tokenizer, tmp_path), name, record_property)
    composed = [text for text in TEXTS if normalizers.NFC().normalize_str(text) == text]
    assert not [text for text in wrong if text in composed]
    assert any("(NFC)" in note for note in found.notes) == bool(wrong)


def test_vocab_and_merges(
    tmp_path: Path,
    bytes_merged: tuple[dict[str, int], list[tuple[str, str]]],
    record_property: Record,
) -> None:
    """The older pair of files: what is named as special is so, as when transformers loads it."""
    vocabulary, merges = bytes_merged
    files = {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]),
    }
    _write(tmp_path, files, tokenizer_class="GPT2Tokenizer", bos_token="<s>", eos_token="</s>",
           unk_token="<|endoftext|>")  # fmt: skip
    texts = [*TEXTS, "a</s>b <s> c<|endoftext|>"]
    assert _compare(tmp_path, "GPT-2, vocab.json and merges.txt", record_property, texts)[1] == []


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_bert(
    tmp_path: Path, words: list[str], lowercase: bool, saved: bool, record_property: Record
) -> None:
    """Special tokens inside a text are found; vowel signs, which llama.cpp strips, are told."""
    folder = _write(tmp_path, {"vocab.txt": "\n".join(words)}, tokenizer_class="BertTokenizer",
                    do_lower_case=lowercase)  # fmt: skip
    if saved:
        numbers = {word: number for number, word in enumerate(words)}
        tokenizer = transformers.BertTokenizer(vocab=numbers, do_lower_case=lowercase)
        folder = _saved(tokenizer, tmp_path)
    odd = {*BY_TOPIC["long"], "a\x0bb", "a\x0cb", "a\x85b"}  # long words; control characters
    texts = [*(text for text in TEXTS if text not in odd), "a [SEP] b [MASK]", "[CLS]x[SEP]"]
    kind = "tokenizer.json" if saved else "vocab.txt"
    name = f"BERT {'uncased' if lowercase else 'cased'}, {kind}"
    vocabulary, wrong = _compare(folder, name, record_property, texts)
    assert not [text for text in wrong if text.isascii()]
    assert any("combining marks" in note for note in vocabulary.notes) == lowercase
    assert lowercase or wrong == []


def test_what_llama_cpp_would_take_for_granted() -> None:
    """It has fixed ids for what a file does not name; none of them is taken in silence."""
    plain = "\n".join(["[UNK]", *(f"w{number}" for number in range(150))]).encode()
    with pytest.raises(PackError, match=r"no token '\[CLS\]'"):
        read_vocabulary({"vocab.txt": plain}, 151, {}, "m")
    pieces = [["▁a", -1.0], ["▁", -2.0], ["b", -3.0], ["<unk>", 0.0]]
    metaspace = {"type": "Metaspace", "prepend_scheme": "always", "replacement": "▁"}
    unigram = {
        "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces},
        "pre_tokenizer": metaspace,
    }
    files = {"tokenizer.json": json.dumps(unigram).encode()}
    found = read_vocabulary(files, 4, {}, "m")
    assert found.metadata["tokenizer.ggml.unknown_token_id"].content == 3
    assert any("ends texts at token 1, '▁'" in note for note in found.notes)
    ended = read_vocabulary(files, 6, {}, "m")  # there are unused tokens: they end nothing
    assert ended.metadata["tokenizer.ggml.eos_token_id"].content == 4
    unigram["model"]["unk_id"] = None
    with pytest.raises(PackError, match="no token for what it does not know"):
        read_vocabulary({"tokenizer.json": json.dumps(unigram).encode()}, 4, {}, "m")


def test_files_that_mislead(
    bytes_merged: tuple[dict[str, int], list[tuple[str, str]]],
) -> None:
    """Ids that are not the model's, and a token around texts that nothing names."""
    with pytest.raises(PackError, match="alone, whose ids are not the model's"):
        read_vocabulary({"sentencepiece.bpe.model": b""}, 10, {}, "m")
    vocabulary, merges = bytes_merged
    lines = "\n".join(" ".join(merge) for merge in merges).encode()
    files = {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": lines,
             "tokenizer_config.json": b'{"add_bos_token": true, "eos_token": "</s>"}'}  # fmt: skip
    with pytest.raises(PackError, match=r"a token \(bos\) around every text"):
        read_vocabulary(files, 1500, {}, "m")


@pytest.mark.parametrize("byte", [0x0A, 0xC1, 0xE4])
def test_bytes_that_have_no_token(byte: int, tmp_path: Path) -> None:
    """None is needed for a byte that is a token itself, or that UTF-8 does not have."""
    tokens = ["<unk>", "<s>", "</s>", "\n", "a", "中"]
    tokens += [f"<0x{number:02X}>" for number in range(256) if number != byte]
    model = {"type": "BPE", "vocab": {t: n for n, t in enumerate(tokens)}, "merges": [],
             "unk_token": "<unk>", "byte_fallback": True}  # fmt: skip
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    files = {"tokenizer.json": json.dumps({"model": model, "normalizer": spaces}).encode()}
    if byte == 0xE4:
        with pytest.raises(PackError, match="lacks 1 tokens for single bytes, such as '<0xE4>'"):
            read_vocabulary(files, len(tokens), {}, "m")
        return
    vocabulary = read_vocabulary(files, len(tokens), {"eos_token_id": 2}, "m").metadata
    theirs = Tokenizer.from_str(json.dumps(
        {"version": "1.0", "added_tokens": [], "model": model, "normalizer": spaces}
    ))  # fmt: skip
    texts = ["a\na", "中é\n\n", "\t😀"]
    ours = llama_cpp.tokens_by({"": vocabulary}, texts, tmp_path)[""]
    assert ours == [theirs.encode(text).ids for text in texts]
