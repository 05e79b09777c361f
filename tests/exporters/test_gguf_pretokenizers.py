"""Every way of cutting text that a tokenizer.json may have: llama.cpp gives the ids of tokenizers.

Text is cut as published tokenizers cut it. The vocabulary is merged over all places at which text
may be cut, so that a cut which llama.cpp makes elsewhere gives other ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from exporters.gguf.vocabulary import Vocabulary, read_vocabulary
from exporters.gguf.vocabulary.cuts import CASED
from mergekit_lite.errors import PackError
from tests.exporters.hard_texts import HARD, random_texts

pytest.importorskip("xllamacpp")
from tests import llama_cpp

TEXTS = (*HARD, *random_texts(600))

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}

_LOWER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BIG = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_O200K = (
    rf"{_FIRST}{_BIG}*{_SMALL}+{_LOWER}?|{_FIRST}{_BIG}+{_SMALL}*{_LOWER}?|\p{{N}}{{1,3}}{_SLASH}"
)
_KIMI = _O200K.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace("[\\r\\n/]*", "[\\r\\n]*")
_DEEPSEEK = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+"
)
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def _split(expression: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": behavior,
            "invert": invert}  # fmt: skip


STEPS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2: GPT-2, GPT-NeoX": [_GPT2],
    "gpt-2: spelled out": [
        _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
        _BYTES,
    ],
    "starcoder: StarCoder, Command R": [_DIGITS, _GPT2],
    "starcoder: spelled out": [_split(r"\p{N}"), _GPT2],
    "falcon: without digits": [
        {"type": "Punctuation", "behavior": "Contiguous"}, _GPT2, _split("[0-9][0-9][0-9]"),
    ],
    "smaug-bpe: GPT-4, Phi-4": [
        _split(rf"{_LOWER}{_WORDS}|\p{{N}}{{1,3}}{_REST}", "Removed", True), _BYTES,
    ],
    "smaug-bpe: the old GPT-4": [
        _split(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"), _BYTES,
    ],
    "llama-bpe: Llama 3, GLM 4": [_split(rf"{_LOWER}{_WORDS}|\p{{N}}{{1,3}}{_REST}"), _BYTES],
    "qwen2: Qwen 1.5 to 3, StableLM 2": [_split(rf"{_LOWER}{_WORDS}|\p{{N}}{_REST}"), _BYTES],
    "qwen2: cases spelled out": [_split(rf"{_SPELLED}{_WORDS}|\p{{N}}{_REST}"), _BYTES],
    "qwen2: Ling, LLaDA": [
        _split(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
               r"|\s*[\r\n]|\s+(?!\S)|\s+"), _BYTES,
    ],
    "qwen35: Qwen 3.5": [
        _split(rf"{_LOWER}|{_FIRST}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+"), _BYTES,
    ],
    "seed-coder: Seed-Coder": [
        _split(_LOWER + "|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+"
               "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"), _BYTES,
    ],
    "jais-2: Jais 2": [
        _split(rf"{_LOWER}{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
               r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)"
               r"|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"), _BYTES,
    ],
    "exaone-moe: K-EXAONE": [
        _split(rf"{_LOWER}|{_FIRST}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"), _BYTES,
    ],
    "ufakzeka: Qwen 2, no contractions": [
        _split(rf"{_FIRST}\p{{L}}+|\p{{N}}{_REST}"), _BYTES,
    ],
    "minicpm5: MiniCPM 5": [
        _split(r"\p{N}{1,3}"), _split(rf"{_LOWER}{_WORDS}|\p{{N}}+{_REST}"), _BYTES,
    ],
    "laguna: lines apart": [
        _split(r"[^\n]+|[\n]+"), _split(rf"{_LOWER}{_WORDS}|\p{{N}}{_REST}"), _BYTES,
    ],
    "deepseek-v3: DeepSeek V3 and R1": [
        _split(r"\p{N}{1,3}"), _split(_KANA),
        _split(_DEEPSEEK + "[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"), _BYTES,
    ],
    "spark2_5: Spark X2.5": [
        _split(r"\p{N}{1,3}"), _split(_KANA),
        _split(_DEEPSEEK + "|[\r\n]|\\s+(?!\\S)|\\s+"), _DIGITS, _BYTES,
    ],
    "bloom: BLOOM": [_split(_BLOOM), _BYTES],
    "bloom: one class": [_split(_BLOOM.replace("|[", "|").replace("])", ")")), _BYTES],
    "viking: Viking": [_split(_BLOOM), _DIGITS, _BYTES],
    "gpt-4o: gpt-oss, Llama 4": [_split(_O200K), _BYTES],
    "tekken: Mistral Nemo, Nemotron 3": [
        _split(_O200K.replace(f"{_LOWER}?", "").replace("{1,3}", "")), _BYTES,
    ],
    "kimi-k2: Kimi K2": [_split(r"[\p{Han}]+|" + _KIMI), _BYTES],
    "tiny_aya: Tiny Aya": [_split(r"\d{1,3}(?=(?:\d{3})*\b)"), _split(_O200K), _BYTES],
    "youtu: Youtu": [
        _split("[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b"
               "\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _KANA),
        _split(_O200K.replace("{1,3}", "")), _BYTES,
    ],
    "laguna: Laguna": [
        _split(r"(?:\r?\n)+(?!\r?\n)", "MergedWithNext"),
        _split(rf"{_LOWER}{_WORDS}|\p{{N}}{_REST}"), _BYTES,
    ],
    "deepseek-coder: DeepSeek Coder": [
        _split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(_CJK), _DIGITS, _BYTES,
    ],
    "superbpe: SuperBPE": [_split(r"\p{N}+"), _split(r"(?=(\d{3})+(?!\d))"), _BYTES],
}  # fmt: skip
"""Steps by the name that llama.cpp has for them and whose they are."""

WHOLE = ("llama-bpe", "tekken", "minicpm5", "youtu")
NEARLY = {
    "gpt-4o": 0.85, "tekken": 0.85, "kimi-k2": 0.85, "tiny_aya": 0.9, "youtu": 0.9,
    "laguna: Laguna": 0.95, "deepseek-coder": 0.9, "superbpe": 0.99,
}  # fmt: skip
"""Where llama.cpp differs, and the part of the texts in which it agrees at least."""


def _document(steps: list[dict[str, Any]], trained: Tokenizer, whole: bool) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(trained.to_str())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    document["model"]["ignore_merges"] = whole
    return document


def _read(document: dict[str, Any]) -> Vocabulary:
    files = {"tokenizer.json": json.dumps(document).encode()}
    return read_vocabulary(files, len(document["model"]["vocab"]), {"eos_token_id": 0}, "m")


def _trained(cut: Any, texts: tuple[str, ...], size: int = 60_000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    tokenizer.train_from_iterator(
        [text for text in texts if len(text) < 70],
        trainers.BpeTrainer(vocab_size=size, min_frequency=1, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    return tokenizer


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A vocabulary in which the shorter texts are a token each, wherever they may be cut."""
    tokenizer = _trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), TEXTS)
    short = [text for text in TEXTS if 0 < len(text) < 70]
    whole = sum(len(encoding.ids) == 1 for encoding in tokenizer.encode_batch(short))
    assert whole > 0.9 * len(short), "a cut would not show"
    return tokenizer


@pytest.fixture(scope="module")
def found(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ids of all texts by llama.cpp and by tokenizers, and what was noted, by what is tested."""
    documents = {
        name: _document(steps, trained, name.split(":")[0] in WHOLE)
        for name, steps in STEPS.items()
    }
    vocabularies = {name: _read(document) for name, document in documents.items()}
    by_llama = llama_cpp.tokens_by(
        {name: vocabulary.metadata for name, vocabulary in vocabularies.items()}, TEXTS,
        tmp_path_factory.mktemp("cuts"),
    )  # fmt: skip
    return {
        name: (
            vocabularies[name],
            by_llama[name],
            [e.ids for e in Tokenizer.from_str(json.dumps(document)).encode_batch(list(TEXTS))],
        )
        for name, document in documents.items()
    }


@pytest.mark.parametrize("name", STEPS)
def test_cuts(
    name: str, found: dict[str, Any], record_property: Callable[[str, str], None]
) -> None:
    """The name is found, and the ids are the same; where they are not, the user is told."""
    vocabulary, by_llama, by_tokenizers = found[name]
    called = name.split(":")[0]
    assert vocabulary.metadata["tokenizer.ggml.pre"].content == called
    wrong = [t for t, a, b in zip(TEXTS, by_llama, by_tokenizers, strict=True) if a != b]
    alike = len(TEXTS) - len(wrong)
    record_property("tokenizers", f"{name}\t{alike} of {len(TEXTS)}")
    least = NEARLY.get(name, NEARLY.get(called, 1.0) if called != "laguna" else 1.0)
    told = any("otherwise than the tokenizer" in note for note in vocabulary.notes)
    assert told == (least < 1)
    if least == 1:
        assert wrong == []
    else:
        assert wrong
        assert alike > least * len(TEXTS)


@pytest.mark.parametrize("whose", ["Falcon", "DeepSeek LLM"])
def test_cuts_that_depend_on_the_vocabulary(
    whose: str, trained: Tokenizer, tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    """llama.cpp cuts less; that is no matter to vocabularies that were trained with the cut."""
    steps: dict[str, list[dict[str, Any]]] = {
        "Falcon": [
            {"type": "Punctuation", "behavior": "Contiguous"}, _GPT2,
            {"type": "Digits", "individual_digits": False}, _split("[0-9][0-9][0-9]"),
        ],
        "DeepSeek LLM": [
            _split("[\r\n]"), _split(rf"\s?[{CASED}]+"),
            _split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            _split("\\s+$"), _split(_CJK), _DIGITS, _BYTES,
        ],
    }  # fmt: skip
    with pytest.raises(PackError, match="cuts text at digits"):
        _read(_document(steps[whose], trained, False))
    cut = Tokenizer.from_str(json.dumps(_document(steps[whose], trained, False))).pre_tokenizer
    own = _trained(cut, TEXTS)
    document = _document(steps[whose], own, False)
    theirs = [e.ids for e in own.encode_batch(list(TEXTS))]
    ours = llama_cpp.tokens_by({whose: _read(document).metadata}, TEXTS, tmp_path)[whose]
    wrong = [t for t, a, b in zip(TEXTS, ours, theirs, strict=True) if a != b]
    record_property(
        "tokenizers", f"cuts by digits: {whose}\t{len(TEXTS) - len(wrong)} of {len(TEXTS)}"
    )
    assert len(wrong) <= (0 if whose == "Falcon" else 0.1 * len(TEXTS))


def test_whole_words(trained: Tokenizer, tmp_path: Path) -> None:
    """Where llama.cpp merges words that are tokens and the tokenizer does not, tokens decide."""
    steps = STEPS["qwen2: Qwen 1.5 to 3, StableLM 2"]
    document = _document(steps, trained, True)
    vocabulary = _read(document)
    assert vocabulary.notes == []
    theirs = Tokenizer.from_str(json.dumps(document)).encode_batch(list(TEXTS))
    ours = llama_cpp.tokens_by({"": vocabulary.metadata}, TEXTS, tmp_path)[""]
    assert ours == [e.ids for e in theirs]
    document["model"]["vocab"]["Xqzj"] = len(document["model"]["vocab"])
    assert any("1 of " in note and "'Xqzj'" in note for note in _read(document).notes)
    for number in range(40):
        document["model"]["vocab"][f"Xqzj{number}"] = len(document["model"]["vocab"])
    with pytest.raises(PackError, match=r"sets 'ignore_merges' to true.*41 of .* tokens"):
        _read(document)


def test_a_step_that_is_not_known() -> None:
    """The step is named; a string is not taken for an expression."""
    trained = _trained(pre_tokenizers.ByteLevel(use_regex=False), ("ab",), 257)
    for steps in (
        [{"type": "Whitespace"}, _BYTES],
        [{**_split(""), "pattern": {"String": r"\p{N}"}}, _GPT2],
        [_split(r"\p{N}", "Removed"), _GPT2],
        [_BYTES],
    ):
        with pytest.raises(PackError, match=r"has no equal of"):
            _read(_document(steps, trained, False))
