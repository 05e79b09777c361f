"""Philox against the authors' published answers and against the paper's formula."""

from __future__ import annotations

import numpy as np

from mergekit_lite.kernels.random import key_of, words_of
from tests.methods import papers


def test_published_answers() -> None:
    """From the known-answer file of Random123: counter and key all zeros."""
    block = words_of(0, 0, 64)
    assert [hex(int(w)) for w in block[::16]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_against_the_formula() -> None:
    key = key_of(3, "model", "tensor")
    words = words_of(key, 1000, 300)
    for i in (1000, 1015, 1016, 1063, 1064, 1299):
        expected = papers.philox4x32(16 * (i // 64) + i % 16, key)[(i // 16) % 4]
        assert int(words[i - 1000]) == expected


def test_a_part_is_a_part_of_the_whole() -> None:
    whole = words_of(9, 0, 5000)
    for first, count in ((0, 1), (63, 2), (64, 64), (1023, 1026), (4000, 1000)):
        np.testing.assert_array_equal(words_of(9, first, count), whole[first : first + count])


def test_bits_are_fair_and_streams_differ() -> None:
    words = words_of(key_of(1, "a", "t"), 0, 1 << 18)
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / (32 * 2**18) ** 0.5
    other = words_of(key_of(1, "b", "t"), 0, 1 << 18)
    both = ((words < 2**31) & (other < 2**31)).mean()
    assert abs(both - 0.25) < 5 * (0.1875 / 2**18) ** 0.5


def test_keys_do_not_run_into_each_other() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of(1, "2") != key_of(12, "")
