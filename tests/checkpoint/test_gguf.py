"""GGUF files read as checkpoints: what gguf-py writes, and files that are broken in every way."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.errors import FileFormatError


def _written(path: Path) -> dict[str, Any]:
    """A file by gguf-py with values of all kinds and tensors of several types."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "grüße")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.texts", ["x", "", "zz"])
    writer.add_block_count(2)
    values = random.standard_normal((6, 512)).astype(np.float32)
    writer.add_tensor("plain.weight", values)
    writer.add_tensor("half.weight", values.astype(np.float16))
    stored = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("coarse.weight", stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"values": values, "coarse": gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)}


def test_a_file_of_gguf_py(tmp_path: Path) -> None:
    written = _written(tmp_path / "m.gguf")
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.names() == ["coarse.weight", "half.weight", "plain.weight"]
    assert (checkpoint.read("plain.weight") == written["values"]).all()
    assert (checkpoint.read("coarse.weight") == written["coarse"]).all()
    assert checkpoint.read("half.weight").dtype == np.float16
    assert checkpoint.stored("coarse.weight") == ("Q8_0", 6 * 512 // 32 * 34)
    assert checkpoint.values["a.text"] == "grüße"
    assert checkpoint.values["a.i64"] == -(2**40)
    assert checkpoint.values["a.texts"] == ["x", "", "zz"]
    assert list(checkpoint.values["a.numbers"]) == [1, 2, 3]
    assert checkpoint.config["num_hidden_layers"] == 2
    [file] = checkpoint.input_files()
    assert file.size == (tmp_path / "m.gguf").stat().st_size
    checkpoint.close()


def _text(content: str) -> bytes:
    raw = content.encode()
    return struct.pack("<Q", len(raw)) + raw


def _file(
    keys: bytes = b"", infos: bytes = b"", data: int = 4096, count: int = 0, tensors: int = 0,
    magic: bytes = b"GGUF", version: int = 3,
) -> bytes:  # fmt: skip
    head = magic + struct.pack("<IQQ", version, tensors, count) + keys + infos
    return head + bytes(-len(head) % 32) + bytes(data)


def _info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + dimensions + struct.pack("<IQ", kind, offset)


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF"),
    "short": (b"GGUF\3\0\0\0", "is no GGUF"),
    "another magic": (_file(magic=b"GGML"), "is no GGUF"),
    "version 1": (_file(version=1), "version 1"),
    "version 4": (_file(version=4), "version 4"),
    "big-endian": (_file(version=3 << 24), "big-endian"),
    "too many tensors": (_file(tensors=1 << 40), "more than it has room for"),
    "too many keys": (_file(count=1 << 40), "more than it has room for"),
    "keys beyond the end": (_file(count=3, data=0) + bytes(40), "unknown type|twice|ends inside"),
    "a long key": (_file(struct.pack("<Q", 1 << 30) + b"x", count=1), "at most"),
    "a key twice": (_file(_key("a", 4, bytes(4)) * 2, count=2), "'a' twice"),
    "unknown kind": (_file(_key("a", 77, bytes(4)), count=1), "unknown type 77"),
    "a truth of 2": (_file(_key("a", 7, b"\2"), count=1), "neither 0 nor 1"),
    "a text beyond the end": (
        _file(_key("a", 8, struct.pack("<Q", 1 << 50)), count=1), "ends inside its head"),
    "an array beyond the end": (
        _file(_key("a", 9, struct.pack("<IQ", 4, 1 << 60)), count=1), "more than the file"),
    "texts beyond the end": (
        _file(_key("a", 9, struct.pack("<IQ", 8, 1 << 40)), count=1), "more than the file"),
    "an array of arrays": (
        _file(_key("a", 9, struct.pack("<IQ", 9, 1)), count=1), "array of type 9"),
    "alignment 3": (
        _file(_key("general.alignment", 4, struct.pack("<I", 3)), count=1), "alignment of 3"),
    "alignment of text": (_file(_key("general.alignment", 8, _text("x")), count=1), "alignment"),
    "no dimension": (_file(infos=_info("t", ()), tensors=1), "0 dimensions"),
    "9 dimensions": (_file(infos=_info("t", (1,) * 9), tensors=1), "9 dimensions"),
    "an empty dimension": (_file(infos=_info("t", (0, 3)), tensors=1), "is \\[3, 0\\]"),
    "a huge dimension": (_file(infos=_info("t", (1 << 60, 4)), tensors=1), "larger than the file"),
    "an overflowing shape": (
        _file(infos=_info("t", (1 << 33, 1 << 33)), tensors=1), "larger than the file"),
    "an unknown type": (_file(infos=_info("t", (4,), kind=99), tensors=1), "type 99"),
    "half a block": (_file(infos=_info("t", (40, 2), kind=8), tensors=1), "blocks of 32"),
    "a crooked offset": (_file(infos=_info("t", (4,), offset=7), tensors=1), "multiple of 32"),
    "past the end": (_file(infos=_info("t", (4,), offset=1 << 20), tensors=1), "cut off"),
    "cut off": (_file(infos=_info("t", (1024, 1)), tensors=1, data=100), "larger than the file"),
    "overlapping": (
        _file(infos=_info("a", (64,)) + _info("b", (64,), offset=32), tensors=2), "overlaps"),
    "a tensor twice": (_file(infos=_info("a", (4,)) * 2, tensors=2), "tensor 'a' twice"),
    "a long name": (
        _file(infos=struct.pack("<Q", 1 << 20) + bytes(64), tensors=1), "at most 1024"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path: Path, case: str) -> None:
    """One error each, which names the file."""
    content, message = BROKEN[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        GgufCheckpoint(path)
    assert str(path) in caught.value.message


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_change_of_a_head(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Bytes of a good file are changed: it is read, or refused; nothing else happens."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    if not path.exists():
        _written(path)
        path.with_suffix(".good").write_bytes(path.read_bytes())
    raw = bytearray(path.with_suffix(".good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        checkpoint = GgufCheckpoint(path)
    except FileFormatError:
        return
    for name in checkpoint.names():
        checkpoint.read(name)
    checkpoint.close()


def test_parts(tmp_path: Path, pack: Callable[..., Any]) -> None:
    """A split file is one checkpoint; a part that is missing is named."""
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(_file(infos=_info("a", (8,)), tensors=1))
    with pytest.raises(FileFormatError, match=r"m-00002-of-00002\.gguf"):
        GgufCheckpoint(path)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(_file(infos=_info("b", (8,)), tensors=1))
    assert GgufCheckpoint(path).names() == ["a", "b"]
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(_file(infos=_info("a", (8,)), tensors=1))
    with pytest.raises(FileFormatError, match="'a' is also in"):
        GgufCheckpoint(path)


def test_inspect_and_merge(tmp_path: Path, pack: Callable[..., Any]) -> None:
    """pack inspect shows what it holds; a merge refuses its codes."""
    _written(tmp_path / "m.gguf")
    ran = pack("inspect", tmp_path / "m.gguf", "--tensors")
    assert ran.code == 0, ran.err
    assert "Q8_0" in ran.out
    assert "gguf" in ran.out
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: linear\nmodels:\n  - model: {tmp_path}/m.gguf\n")
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "quantized (gguf)" in ran.err
