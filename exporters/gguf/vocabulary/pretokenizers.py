"""How a byte-level BPE tokenizer cuts text before it merges, by the name that llama.cpp gives it.

A tokenizer.json says itself how it cuts: a list of steps with regular expressions. Those steps are
what is looked up here, so that a vocabulary which was extended or trained anew still converts. Each
entry stands for expressions that llama.cpp computes (``llm_tokenizer_bpe``, llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_lite.errors import PackError

__all__ = ["find_pretokenizer"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Step = tuple[object, ...]

_BYTES: Step = ("ByteLevel", False)
_GPT2: Step = ("ByteLevel", True)


def _split(expression: str) -> Step:
    return ("Split", expression, "Isolated", False)


def _by_case(digits: str) -> list[str]:
    """One expression as it is spelled with and without a flag for case."""
    return [head + _LETTERS + digits + _REST for head in (_CONTRACTIONS, _CASES)]


_DEEPSEEK3 = (
    _split(r"\p{N}{1,3}"),
    _split("[一-龥぀-ゟ゠-ヿ]+"),
    _split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    _BYTES,
)

_GPT4O = rf"{_UPPER}{_CONTRACTIONS}?|{_LOWER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_SLASHES}"
_TEKKEN = rf"{_UPPER}|{_LOWER}|\p{{N}}{_SLASHES}"
_LLAMA3 = {True: "llama-bpe", False: "smaug-bpe"}

_QWEN35 = (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BLOOM = _split(r" ?[^(\s|.,!?…。，、।۔،)]+")
_SEED = r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS = ("Digits", True)
_FALCON_PUNCTUATION = ("Punctuation", "Contiguous")
_FALCON_DIGITS = ("Split", "[0-9][0-9][0-9]", "Isolated", False)
_DEEPSEEK_CODER = (
    _split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split("[一-龥ࠀ-一가-퟿]+"),
    _SINGLE_DIGITS, _BYTES,
)  # fmt: skip

_NAMES: Mapping[tuple[Step, ...], Mapping[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (_SINGLE_DIGITS, _GPT2): {False: "starcoder"},
    (_FALCON_PUNCTUATION, _GPT2, _FALCON_DIGITS): {False: "falcon"},
    **{(_split(expression), _BYTES): _LLAMA3 for expression in _by_case(r"|\p{N}{1,3}")},
    **{(_split(expression), _BYTES): {False: "qwen2"} for expression in _by_case(r"|\p{N}")},
    **{(_split(head + _QWEN35), _BYTES): {False: "qwen35"} for head in (_CONTRACTIONS, _CASES)},
    **{
        (_split(head + _LETTERS + _SEED), _BYTES): {False: "seed-coder"}
        for head in (_CONTRACTIONS, _CASES)
    },
    (_split(_GPT4O), _BYTES): {False: "gpt-4o"},
    (_split(_TEKKEN), _BYTES): {True: "tekken"},
    _DEEPSEEK3: {False: "deepseek-v3"},
    _DEEPSEEK_CODER: {False: "deepseek-coder"},
    (_BLOOM, _BYTES): {False: "bloom"},
    (_BLOOM, _SINGLE_DIGITS, _BYTES): {False: "viking"},
}
"""Names by steps, then by whether whole words of the vocabulary are taken without merging."""


def find_pretokenizer(pre_tokenizer: Any, *, ignore_merges: bool, label: str) -> str:
    """The name of a pre-tokenizer.

    Args:
        pre_tokenizer: That part of tokenizer.json.
        ignore_merges: Whether a word that is a token is taken without merging.
        label: How the user named the model.

    Raises:
        PackError: llama.cpp has no equal of it; the message says of which part.
    """
    steps = tuple(_steps(pre_tokenizer, label))
    names = _NAMES.get(steps)
    if names is None:
        shown = "; ".join(" ".join(str(part) for part in step) for step in steps) or "nothing"
        raise PackError(
            f"{label}: tokenizer.json cuts text by steps that llama.cpp has no equal of: {shown}",
            "Train the tokenizer with the cutting of a known model, for example Llama 3 or Qwen2.",
        )
    if ignore_merges not in names:
        raise PackError(
            f"{label}: tokenizer.json sets 'ignore_merges' to {str(ignore_merges).lower()}; with "
            f"this cutting of text llama.cpp ({', '.join(names.values())}) has the opposite",
            "Set it otherwise in tokenizer.json, if the vocabulary was made so.",
        )
    return names[ignore_merges]


def _steps(part: Any, label: str) -> list[Step]:
    """The steps, in a form in which equal ones are equal."""
    if part is None:
        return []
    kind = part.get("type")
    if kind == "Sequence":
        return [step for each in part["pretokenizers"] for step in _steps(each, label)]
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            raise PackError(
                f"{label}: tokenizer.json puts a space before every text ('add_prefix_space' of "
                "ByteLevel), which llama.cpp does not do for such a vocabulary",
                "Set it to false in tokenizer.json; the first word of a text gets other tokens.",
            )
        return [("ByteLevel", bool(part.get("use_regex", True)))]
    if kind == "Split":
        pattern = part.get("pattern", {})
        expression = pattern.get("Regex", pattern.get("String"))
        # To keep what does not match is to cut where it matches.
        behavior, invert = part.get("behavior"), bool(part.get("invert"))
        if behavior == "Removed" and invert:
            behavior, invert = "Isolated", False
        return [("Split", expression, behavior, invert)]
    if kind == "Punctuation":
        return [("Punctuation", part.get("behavior", "Isolated"))]
    if kind == "Digits":
        return [("Digits", bool(part.get("individual_digits")))]
    return [(kind, *(value for key, value in sorted(part.items()) if key != "type"))]
