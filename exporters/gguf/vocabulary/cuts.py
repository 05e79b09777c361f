"""Ways of cutting text that llama.cpp computes, by the steps of a tokenizer.json that say the same.

Each entry stands for the expressions of ``llm_tokenizer_bpe`` in llama-vocab.cpp, and is compared
with it by running both. Where llama.cpp computes them only nearly, an entry says for which text: it
sees of a character outside ASCII no more than whether it is a letter, mark, number, sign or space.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from exporters.gguf.vocabulary.merging import Merging

__all__ = ["CASED", "CUTS", "Cut", "Step", "spelled", "split"]

Step = tuple[object, ...]
"""One step: its kind, then what it is given."""


@dataclass(frozen=True)
class Cut:
    """One of llama.cpp's ways of cutting.

    Attributes:
        name: ``tokenizer.ggml.pre``.
        whole: Whether a word that is a token is then taken without merging.
        differs: Text that llama.cpp cuts otherwise; empty if none is known.
        breaks: Whether a vocabulary merges over places where llama.cpp does not cut, though the
            tokenizer does; None if it cuts at all of them.
    """

    name: str
    whole: bool = False
    differs: str = ""
    breaks: Callable[[Merging], bool] | None = None


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", _CONTRACTIONS),
    (r"'(?:[sdmt]|ll|ve|re)", _GPT2_CONTRACTIONS),
    # What follows can match nothing of what was taken, so that giving it back changes nothing.
    (r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+"),
    (r"[^\s\p{L}\p{N}]++[\r\n]*", r"[^\s\p{L}\p{N}]+[\r\n]*"),
    # Both end with the last line break of a run of spaces.
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
    (r"\p{N}{1}|", r"\p{N}|"),
)
"""Spellings of the same, each with the one that is looked up."""

_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_THREES = r"|\p{N}{1,3}"
_LLAMA3 = _CONTRACTIONS + _LETTERS + _THREES + _SIGNS + _ENDS
_QWEN2 = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _SIGNS + _ENDS
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_ENDS}"
)
_SEED = rf"{_CONTRACTIONS}{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_ENDS}"
_JAIS2 = (
    _CONTRACTIONS + _LETTERS + _THREES + _SIGNS + r"|\s*[\r\n]+"
    + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s{1}"
)  # fmt: skip
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?{_ENDS}"
)
_GPT2_WORDS = rf"{_GPT2_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"

_HEAD = r"[^\r\n\p{L}\p{N}]?"


def _by_case(tail: str = "", but: str = "") -> str:
    """Words that begin anew with a capital: capitals, then small letters, or one of the two."""
    big = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    small = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    return f"{_HEAD}{big}*{small}+{tail}|{_HEAD}{big}+{small}*{tail}"


_TAILED = _by_case(f"{_CONTRACTIONS}?")
_O200K = _TAILED + _THREES + _SLASHES + _ENDS
_TEKKEN = _by_case() + r"|\p{N}" + _SLASHES + _ENDS
_YOUTU = _TAILED + r"|\p{N}" + _SLASHES + _ENDS
_KIMI = r"[\p{Han}]+|" + _by_case(f"{_CONTRACTIONS}?", r"&&[^\p{Han}]") + _THREES + _SIGNS + _ENDS
_SIGN_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c"
    "\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _KANA
)
CASED = (  # letters that have case, as DeepSeek lists them
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
    "\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-"
    "\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    "\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183"
    "\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-"
    "\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_SIGNS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"


def spelled(expression: str) -> str:
    """An expression of a tokenizer.json, in a form in which equal ones are equal."""
    expression = unicodedata.normalize("NFC", expression)
    for spelling, one in _SPELLINGS:
        expression = expression.replace(spelling, one)
    return expression


def split(expression: str, behavior: str = "Isolated") -> Step:
    """A step that cuts by an expression."""
    return ("Split", spelled(expression), behavior, False)


_BYTES: Step = ("ByteLevel", False)
_GPT2: Step = ("ByteLevel", True)
_DIGITS: Step = ("Digits", True)
_ASCII_THREES = split("[0-9][0-9][0-9]")
_FALCON = (("Punctuation", "Contiguous"), _GPT2)

_MARKS = "letters with combining marks, and capitals of other scripts than the Latin one,"
_CAPITALS = "words of small and capital letters"
_SPACES = "other spaces than those of ASCII"

CUTS: Mapping[tuple[Step, ...], tuple[Cut, ...]] = {
    (_GPT2,): (Cut("gpt-2"),),
    (split(_GPT2_WORDS), _BYTES): (Cut("gpt-2"),),
    (_DIGITS, _GPT2): (Cut("starcoder"),),
    (_DIGITS, split(_GPT2_WORDS), _BYTES): (Cut("starcoder"),),
    (*_FALCON, _ASCII_THREES): (Cut("falcon"),),
    (*_FALCON, ("Digits", False), _ASCII_THREES): (
        Cut("falcon", breaks=Merging.joins_digits_and_others),
    ),
    (split(_LLAMA3), _BYTES): (Cut("smaug-bpe"), Cut("llama-bpe", whole=True)),
    (split(_QWEN2), _BYTES): (Cut("qwen2"),),
    (split(_QWEN35), _BYTES): (Cut("qwen35"),),
    (split(_SEED), _BYTES): (Cut("seed-coder"),),
    (split(_JAIS2), _BYTES): (Cut("jais-2"),),
    (split(_EXAONE_MOE), _BYTES): (Cut("exaone-moe"),),
    (split(_QWEN2.removeprefix(f"{_CONTRACTIONS}|")), _BYTES): (Cut("ufakzeka"),),
    (split(r"\p{N}{1,3}"), split(_LLAMA3.replace(_THREES, r"|\p{N}+")), _BYTES): (
        Cut("minicpm5", whole=True),
    ),
    (split(r"[^\n]+|[\n]+"), split(_QWEN2), _BYTES): (Cut("laguna"),),
    (split(r"(?:\r?\n)+(?!\r?\n)", "MergedWithNext"), split(_QWEN2), _BYTES): (
        Cut("laguna", differs="line breaks with carriage returns"),
    ),
    (split(_O200K), _BYTES): (Cut("gpt-4o", differs=_MARKS),),
    (split(_TEKKEN), _BYTES): (Cut("tekken", whole=True, differs=_MARKS),),
    (split(_KIMI), _BYTES): (Cut("kimi-k2", differs=_MARKS),),
    (split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(_O200K), _BYTES): (
        Cut("tiny_aya", differs=_CAPITALS),
    ),
    (split(_SCRIPTS), split(_YOUTU), _BYTES): (Cut("youtu", whole=True, differs=_CAPITALS),),
    (split(r"\p{N}{1,3}"), split(_KANA), split(rf"{_SIGN_WORDS}[\r\n]*{_ENDS}"), _BYTES): (
        Cut("deepseek-v3"),
    ),
    (split(r"\p{N}{1,3}"), split(_KANA),
     split(rf"{_SIGN_WORDS}|[\r\n]|\s+(?!\S)|\s+"), _DIGITS, _BYTES): (Cut("spark2_5"),),
    (split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(_CJK), _DIGITS,
     _BYTES): (Cut("deepseek-coder", differs=_SPACES),),
    (split(r"[\r\n]"), split(rf"\s?[{CASED}]+"), split(_DEEPSEEK_SIGNS), split(r"\s+$"),
     split(_CJK), _DIGITS, _BYTES): (
        Cut("deepseek-llm", differs=_SPACES, breaks=Merging.joins_digits),
    ),
    (split(r"\p{N}+"), split(r"(?=(\d{3})+(?!\d))"), _BYTES): (
        Cut("superbpe", differs="digits of other scripts than the Latin one"),
    ),
    (split(_BLOOM), _BYTES): (Cut("bloom"),),
    (split(_BLOOM.replace("|[", "|").replace("])", ")")), _BYTES): (Cut("bloom"),),
    (split(_BLOOM), _DIGITS, _BYTES): (Cut("viking"),),
    (split(_BLOOM.replace("|[", "|").replace("])", ")")), _DIGITS, _BYTES): (Cut("viking"),),
}  # fmt: skip
"""Ways of cutting by steps; the first is taken where none treats whole words as the tokenizer."""
