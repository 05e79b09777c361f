"""Texts on which tokenizers come apart: scripts, digits, whitespace, code, emoji, contractions."""

from __future__ import annotations

__all__ = ["TEXTS"]

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's what they'd've wanted, isn't it? I'LL SEE.",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n\n\tif x >= 10**9 and x != 0x1F:\n',
    "Numbers: 7 42 365 1024 65536 3.14159 1,000,000.00 -12e-34 1/2 0b1011 2026-11-21 12:34:56",
    "  leading spaces,   runs of   spaces,\ttabs\t\t, \n\n\n newlines \r\n and trailing   ",
    "Grüße, façade, naïve coöperation, Ærøskøbing; Žluťoučký kůň; İstanbul, ß and ẞ",
    "Привет, мир! Ελληνικά κείμενα. שלום עולם مرحبا بالعالم हिन्दी में पाठ ภาษาไทย",
    "日本語のテキストと漢字、カタカナ。中文字符測試，简体字。한국어 문장입니다.",
    "e\u0301 and \u00e9, a\u030a and \u00e5, \u1112\u1161\u11ab and \ud55c, ﬁ ligature, ①②③ Ⅷ",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️ ✨🚀 🇩🇪🇯🇵 (╯°□°)╯︵ ┻━┻",
    "https://example.org/a?b=c&d=%20#e user.name+tag@example.com C:\\Users\\x /usr/lib/*.so",
    '{"key": [1, 2.5, null, true], "nested": {"a\\tb": "\\u00e9"}} <div class="x">&amp;</div>',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!??????........-----",
    "snake_case camelCase PascalCase SCREAMING_SNAKE kebab-case x1y2z3 Ünïcödé_næmé",
    "\u200bzero\u200dwidth\u2060joiner\ufeff, no\u00a0break\u202fspace, soft\u00adhyphen\u3000wide",
    "a",
    " ",
    "",
)
"""Each is tokenized by itself."""
