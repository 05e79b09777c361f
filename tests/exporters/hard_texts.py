"""Texts on which tokenizers come apart, written down by what is difficult about them.

They go beyond the ones with which a written file is verified: every text here is one that some way
of cutting, normalising or merging gets wrong.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from exporters.gguf.difficult import TEXTS

__all__ = ["BY_TOPIC", "HARD", "random_texts"]

BY_TOPIC: Mapping[str, Sequence[str]] = {
    "contractions": (
        "I'm you're he's we'll they'd I've don't",
        "I'M YOU'RE HE'S WE'LL THEY'D I'VE DON'T",
        "I'm I'M i'M 'S 's 'Ll 'lL 'Re 'rE 'Ve 'D 'T",
        "'tis 'twas rock 'n' roll o'clock l'été d'où qu'il",
        "it''s  'ssss 'test 'REtro can't've ''d",
        "İstanbul'da Ankara'ya THEY'LLS we'llama",
    ),
    "digits": (
        "0 1 12 123 1234 12345 123456 1234567 12345678",
        "1,234,567.89 -1 +1 1e10 0x1F 0b11 1_000",
        " 1  2   3\t4\n5",
        "abc123def 12ab34 a1b2c3 v1.2.3 x86_64",
        "１２３ ４５６７ ٠١٢٣٤٥ ०१२३४ ๑๒๓",
        "½ ⅓ ² ³ ¹ ① ② Ⅷ ⅳ 一二三 〇",
        "1½ 2² x³ 10⁶ H₂O",
    ),
    "spaces": (
        " ", "  ", "   ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", " \n ", "\t\n\t",
        "a b", "a  b", "a   b", "a    b", " a", "  a", "   a", "a ", "a  ", "a   ",
        "a\nb", "a\n\nb", "a \nb", "a\n b", "a \n b", "a  \n\n  b", "a\r\nb\r\n\r\nc",
        "a\tb", "a\t\tb", "\ta", "\t a", " \ta", "a\t \t b",
        "x" + " " * 17 + "y", "x" + "\n" * 17 + "y", "\n   \n   \n", "   \n\n\n   ",
        "a\u00a0b", "a\u2003b", "a\u3000b", "a\u200bb", "a\u2028b", "a\u2029b", "a\u202fb",
        "\u00a0", "\u3000\u3000x", "a \u00a0 b", "\u2003\n\u2003x",
        "a\x0bb", "a\x0cb", "a\x85b", "a\x1cb", "\x0b\x0c",
    ),
    "signs": (
        "!", "!!", "...", "?!?!", "a.b,c;d:e", "(a)[b]{c}<d>", "a . b , c", " .", " ...", " !a",
        "--", "---", "a-b", "a--b", "—a—", "#tag @user $10 50% a&b a*b a+b=c a^b a|b ~a `b`",
        "'a' \"b\" “c” ‘d’ «e» ‹f› „g”", "a/b\\c //d", "///\n", "a///\n\nb", "*/\n/*",
        "!\n", "!\n\n", " !\n \n", "!\r\n!\r\n", ";\n\t}", "$$ €5 £6 ¥7 ₹8", "© ® ™ ° µ § ¶",
        "→ ⇒ ∀x∈ℝ ∑∏√∞ ≤≥≠ ½×÷", "。、！？「」『』（）：；", "…… —— ～～", "।॥ ۔ ، ؟",
        "_", "__init__", "_a_b_", "a_b", "-_-", "^_^", "=>", "<=", "!==", "::", "->", "@@", "##",
    ),
    "letters": (
        "abc ABC Abc aBC ABc camelCase PascalCase HTTPServer iPhone XMLHttpRequest",
        "ÀÉÎõü ÇA ça Straße STRASSE ﬁn Ǆ ǅ ǆ ŉ ß ẞ",
        "ПРИВЕТ привет Привет ПриветМир ЁЖ їжак",
        "ΑΒΓ αβγ ΑλφαΒήτα ς Σ", "ՀԱՅԵՐԵՆ հայերեն", "ქართული ᲥᲐᲠᲗᲣᲚᲘ",
        "中文 汉字漢字 中a文b 한국어 한글ABC 日本語 ひらがな カタカナ ｶﾀｶﾅ ー々〆",
        "ภาษาไทย ລາວ ខ្មែរ မြန်မာ", "አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ", "ʰʷ ª º ⁿ ᵃ ˈ ʼ",
        "𝐀𝐁𝐂 𝒶𝒷 𝟙𝟚 𐐀𐐨 𠀀𠀁 𪜀 𒀀", "Ⓐⓑ 🅰 🄰",
    ),
    "marks": (
        "e\u0301", "E\u0301a\u0308", "n\u0303o", "a\u0301\u0302\u0303b", "\u0301", " \u0301a",
        "हिन्दी में क्षत्रिय कि की", "বাংলা ভাষা", "தமிழ் மொழி", "తెలుగు", "ಕನ್ನಡ", "മലയാളം",
        "العَرَبِيَّةُ", "עִבְרִית", "ไก่ กิน", "กำ น้ำ", "1\u0301 2\u20e3", "Z͑ͫ̓a̴l͖g͔o̡",
        "\u1112\u1161\u11ab", "ｶﾞ が か\u3099",
    ),
    "emoji": (
        "😀", "😀😀", "a😀b", " 😀 ", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "❤️", "1️⃣", "🇩🇪🇯🇵",
        "☺ ☺️ ☎", "🧑🏿‍🚀.", "\U0001fae8\U0001f6dc",
    ),
    "odd": (
        "a\x00b", "\x00", "a\x01\x02\x7fb", "a\u0080b\u009f", "\ufeffa", "a\u00adb", "a\u200db",
        "a\u2060b", "\ufffd", "\ue000", "\U000e0041", "\U0010ffff", "\u0378", "\ufffe",
        "\u202eabc\u202c", "\u0600 \u06dd", "a\u034fb",
    ),
    "code": (
        "for (int i=0;i<n;i++){a[i]+=b[i];}\n", "    return x\n        pass\n\n\n\tend",
        "def f():\n    '''doc'''\n    return f'{x:>{w}}'\n", "<a href='x'>y</a><!-- z -->",
        "SELECT * FROM t WHERE a='b' AND c<>1;", "#include <stdio.h>\r\n\r\nint main(){}\r\n",
        "https://a.b/c?d=e&f=%20#g", "a@b.co", "C:\\d\\e", "/usr/bin/*", "~/.bashrc", "x:=1",
        "\\frac{1}{2} $x_i^2$", "{\"a\":[1,2,{\"b\":null}]}", "rm -rf ./*", "i++; --j; k<<=2",
    ),
    "long": (
        "x" * 101, "x" * 300, "ab" * 100, "a" * 20 + "1" * 20 + "!" * 20, "é" * 120, "中" * 60,
        "0" * 31, "word " * 40, "!" * 77, " " * 90, "\n" * 40, "Xx" * 40, "a_" * 30, "😀" * 20,
    ),
}  # fmt: skip

HARD = (*TEXTS, *(text for texts in BY_TOPIC.values() for text in texts))
"""All of them."""

_PARTS = (
    *"aAbéÉжЖßαΩ中한あ", *"019½²٣", *"  \n\t\r", " ", "\n", "  ", "\u00a0", "\u3000",
    *".,!?'\"()/\\-_#$+<=~|`、。…", "'s", "'S", "'ll", "'RE", "\u0301", "ि", "😀", "\u200d",
    "ǅ", "ʰ",
)  # fmt: skip


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of up to 12 difficult parts in a row."""
    chosen = random.Random(seed)
    return ["".join(chosen.choices(_PARTS, k=chosen.randint(1, 12))) for _ in range(count)]
