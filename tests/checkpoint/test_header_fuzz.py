"""A million mutated headers: each is either refused or keeps every promise of the format."""

from __future__ import annotations

import json
import random
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergekit_lite.checkpoint.header import Header, parse_header, read_length, write_header
from mergekit_lite.dtypes import DTYPES
from mergekit_lite.errors import FileFormatError

PARTS = 4
EACH = 250_000
SPLINTERS = [b'"', b"{", b"}", b"[", b"]", b":", b",", b"-", b"0", b"1e9", b"null",
             b"true", b"\\u0000",
             b'"shape"', b'"dtype"', b'"data_offsets"', b"[0,0]", b'"BF16"', b"\xff", b"\\ud800",
             b"18446744073709551616", b"__metadata__", b" ", b"\x00"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, 8, 15, 16, 31, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64]


def _seeds() -> list[tuple[bytes, int]]:
    shapes = [
        [("a", "F32", (2, 2)), ("b", "BF16", (3,)), ("c", "U8", ())],
        [("model.layers.0.w", "F16", (4, 0)), ("x", "F8_E4M3", (5, 1, 2))],
        [("w", "I64", (1,))],
    ]
    seeds = []
    for tensors in shapes:
        prefix, header = write_header(((n, DTYPES[d], s) for n, d, s in tensors), {"format": "pt"})
        size = max(entry.end for entry in header.entries.values())
        seeds.append((prefix[8:], size))
    return seeds


def _mutate(chance: random.Random, raw: bytes, size: int) -> tuple[bytes, int]:
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] = chance.randrange(256)
        elif kind == 1 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[at : at + chance.randrange(1, 12)]
        elif kind == 3:
            data[at:at] = chance.choice(SPLINTERS)
        elif kind == 4:
            other = chance.randrange(len(data) + 1)
            data[at:at] = data[other : other + chance.randrange(1, 30)]
        elif kind == 5:  # put another number in the place of one
            digits = [i for i, c in enumerate(data) if 48 <= c <= 57]
            if digits:
                start = chance.choice(digits)
                end = start
                while end < len(data) and 48 <= data[end] <= 57:
                    end += 1
                data[start:end] = str(chance.choice(NUMBERS)).encode()
        else:
            size = max(0, size + chance.choice((-16, -1, 1, 8, 2**20)))
    return bytes(data), size


def _check(header: Header, raw: bytes, size: int) -> None:
    at = 8 + len(raw)
    assert header.data_start == at
    for entry in header.entries.values():
        assert entry.start == at
        assert entry.end - entry.start == prod(entry.shape) * entry.dtype.itemsize
        at = entry.end
    assert at == size
    assert all(isinstance(v, str) for v in header.metadata.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_headers(part: int) -> None:
    chance = random.Random(part)
    seeds = _seeds()
    accepted = unnamed = 0
    for number in range(EACH):
        raw, size = seeds[number % len(seeds)]
        if number % 50:
            raw, size = _mutate(chance, raw, size)
        else:
            raw = chance.randbytes(chance.randrange(60))
        try:
            length = read_length(len(raw).to_bytes(8, "little"), size, "f")
            assert length == len(raw)
            header = parse_header(raw, size, "f")
        except FileFormatError as error:
            unnamed += not error.message.startswith("f: ")
            continue
        accepted += 1
        _check(header, raw, size)
    assert unnamed == 0
    assert 0 < accepted < EACH // 2


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL"]),
            st.lists(st.integers(0, 5), max_size=4),
        ),
        max_size=8,
    ),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=5), max_size=3
    ),
)
@settings(deadline=None)
def test_what_is_written_is_read_by_us_and_by_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str],
) -> None:
    metadata = {k: v for k, v in metadata.items() if k.isascii() and v.isascii()}
    # Large types first, as the planner lays them out.
    order = sorted(tensors, key=lambda n: (-DTYPES[tensors[n][0]].itemsize, n))
    prefix, header = write_header(
        ((n, DTYPES[tensors[n][0]], tuple(tensors[n][1])) for n in order), metadata
    )
    size = max((e.end for e in header.entries.values()), default=len(prefix))
    again = parse_header(prefix[8:], size, "f")
    assert dict(again.entries) == dict(header.entries)
    assert again.metadata == metadata
    assert len(prefix) % 8 == 0
    assert json.loads(prefix[8:]).keys() - {"__metadata__"} == tensors.keys()
    path: Path = tmp_path_factory.mktemp("written") / "f.safetensors"
    path.write_bytes(prefix + bytes(size - len(prefix)))
    with safe_open(path, "np") as opened:
        assert set(opened.keys()) == set(tensors)
