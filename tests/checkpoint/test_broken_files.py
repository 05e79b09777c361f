"""Broken and hostile headers, indexes, configs and folders: one error each that names the file."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.checkpoint.header import MAX_HEADER_BYTES
from mergekit_lite.checkpoint.locate import open_checkpoint
from mergekit_lite.errors import PackError
from tests.conftest import random_models, write_recipe

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def _file(header: Any, data: int = 16, length: int | None = None) -> bytes:
    """A file with a header that may be anything, and so many bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(raw) if length is None else length
    return stated.to_bytes(8, "little") + raw + bytes(data)


def _w(**changes: Any) -> dict[str, Any]:
    return {"w": {**GOOD, **changes}}


WHOLE = _file({"w": GOOD})
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"1234567", "too few"),
    "cut in the length": (WHOLE[:5], "too few"),
    "cut in the header": (WHOLE[:30], "truncated"),
    "cut in the data": (WHOLE[:-1], "lies outside the file"),
    "length of 2^64-1": (_file({"w": GOOD}, length=2**64 - 1), "not a safetensors file"),
    "length of 2^63": (_file({"w": GOOD}, length=2**63), "not a safetensors file"),
    "length above the limit": (_file({"w": GOOD}, length=MAX_HEADER_BYTES + 1),
        "not a safetensors"),
    "length beyond the file": (_file({"w": GOOD}, length=10_000), "truncated"),
    "length of zero": (_file(b""), "not a safetensors file"),
    "a page": (b"<!DOCTYPE html><html><head><title>404</title></head></html>" * 9, "not a safet"),
    "an lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pointer of Git LFS"),
    "not JSON": (_file(b"{'w': 1}"), "not valid JSON"),
    "an array": (_file(b"[1, 2]"), "does not begin"),
    "leading space": (_file(b' {"w": 1}'), "does not begin"),
    "cut JSON": (_file(b'{"w": {"dtype"'), "not valid JSON"),
    "two documents": (_file(b"{} {}"), "not valid JSON"),
    "bad UTF-8": (_file(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "lone surrogate": (_file(b'{"\\ud800": ' + json.dumps(GOOD).encode() + b"}"), "Unicode"),
    "NaN": (_file(b'{"w": NaN}'), "NaN"),
    "infinity": (_file(b'{"w": {"dtype": "F32", "shape": [Infinity]}}'), "Infinity"),
    "deep nesting": (_file(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "a number of 5000 digits": (_file(b'{"w": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a tensor twice": (
        _file(b'{"w": %b, "w": %b}' % ((json.dumps(GOOD).encode(),) * 2)), "'w' twice",
    ),
    "a key twice": (_file(b'{"w": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' twice"),
    "tensor is a number": (_file({"w": 3}), "'w' is not described"),
    "no dtype": (_file({"w": {"shape": [2, 2], "data_offsets": [0, 16]}}), "no 'dtype'"),
    "no shape": (_file({"w": {"dtype": "F32", "data_offsets": [0, 16]}}), "no 'shape'"),
    "no offsets": (_file({"w": {"dtype": "F32", "shape": [2, 2]}}), "no 'data_offsets'"),
    "unknown key": (_file(_w(strides=[1])), "unknown key 'strides'"),
    "unknown dtype": (_file(_w(dtype="F31")), "unknown dtype 'F31'"),
    "dtype is a list": (_file(_w(dtype=["F32"])), "unknown dtype"),
    "negative dimension": (_file(_w(shape=[-2, 2])), "holds -2"),
    "fractional dimension": (_file(_w(shape=[2.0, 2])), "holds 2.0"),
    "true as dimension": (_file(_w(shape=[True, 4])), "holds True"),
    "shape is text": (_file(_w(shape="22")), "not a list"),
    "shape overflows": (_file(_w(shape=[2**62, 2**62])), "takes"),
    "dimension overflows": (_file(_w(shape=[2**64, 0])), "not an integer from 0"),
    "too many dimensions": (_file(_w(shape=[1] * 100)), "at most 64"),
    "shape and bytes disagree": (_file(_w(shape=[2, 3])), "takes 24"),
    "negative offset": (_file(_w(data_offsets=[-16, 0])), "holds -16"),
    "offsets reversed": (_file(_w(data_offsets=[16, 0])), "lies outside"),
    "offset past the end": (_file(_w(data_offsets=[16, 32])), "lies outside"),
    "huge offset": (_file(_w(data_offsets=[2**62, 2**62 + 16])), "lies outside"),
    "one offset": (_file(_w(data_offsets=[0])), "not a pair"),
    "three offsets": (_file(_w(data_offsets=[0, 8, 16])), "at most 2"),
    "gap at the start": (_file(_w(data_offsets=[8, 24]), 24), "leaves a gap"),
    "gap between": (
        _file({"a": GOOD, "b": {**GOOD, "data_offsets": [24, 40]}}, 40), "'b' leaves a gap",
    ),
    "overlap": (
        _file({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}, 24), "'b' overlaps",
    ),
    "the same place twice": (_file({"a": GOOD, "b": GOOD}), "overlaps"),
    "bytes at the end": (_file({"w": GOOD}, 17), "belong to no tensor"),
    "metadata is a list": (_file({"__metadata__": [], "w": GOOD}), "__metadata__"),
    "metadata holds a number": (_file({"__metadata__": {"a": 1}, "w": GOOD}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path: Path, name: str) -> None:
    content, said = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(PackError) as caught:
        open_checkpoint(str(path), tmp_path)
    assert str(path) in str(caught.value)
    assert said in caught.value.message


def _index(weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(
            weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        )

    return change


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make(folder / "model.safetensors")

    return change


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


def _only(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


EMBED = "embed.weight"
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "index leads out": (_index({EMBED: "../b/model.safetensors"}), "outside the model's folder"),
    "index is absolute": (_index({EMBED: "/etc/passwd"}), "outside the model's folder"),
    "index with backslash": (_index({EMBED: "..\\x.safetensors"}), "outside the model's folder"),
    "index with NUL": (_index({EMBED: "a\0b.safetensors"}), "outside the model's folder"),
    "index with a number": (_index({EMBED: 3}), "no file name for the tensor 'embed.weight'"),
    "index with nothing": (_index({EMBED: ""}), "outside the model's folder"),
    "index of another kind": (_index({EMBED: "config.json"}), "is not a safetensors file"),
    "shard is missing": (_index({EMBED: "x.safetensors"}), "'x.safetensors', which is not there"),
    "shard lacks a tensor": (
        _index({EMBED: "model.safetensors", "more": "model.safetensors"}),
            "lacks the tensor 'more'",
    ),
    "shard has one more": (_index({EMBED: "model.safetensors"}), "does not name"),
    "index is a list": (_index("[]"), "not a JSON object"),
    "index is cut": (_index('{"weight_map": {'), "not valid JSON"),
    "index without map": (_index("{}"), "has no 'weight_map'"),
    "index with an empty map": (_index({}), "has no 'weight_map'"),
    "index nested deeply": (_index("[" * 100_000), "not valid JSON"),
    "config is a list": (_write("config.json", b"[1]"), "config.json: not a JSON object"),
    "config is cut": (_write("config.json", b'{"a":'), "config.json: not valid JSON"),
    "config is no text": (_write("config.json", b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "config nested deeply": (_write("config.json", b'{"a":' * 90_000), "config.json: not valid"),
    "config of a quantized model": (
        _write("config.json", b'{"quantization_config": {"quant_method": "gptq"}}'),
            "quantized (gptq)",
    ),
    "tokenizer is cut": (_write("tokenizer.json", b'{"model"'), "tokenizer.json: not valid JSON"),
    "tokenizer has no words": (_write("tokenizer.json", b"{}"), "has no vocabulary"),
    "tokenizer id is text": (
        _write("tokenizer.json", b'{"model": {"vocab": {"a": "1"}}}'), "has no id",
    ),
    "tensor in two files": (
        lambda f: (f / "two.safetensors").write_bytes((f / "model.safetensors").read_bytes())
        and (f / "model.safetensors").rename(f / "one.safetensors")
        and None,
        "is also in one.safetensors",
    ),
    "a folder for a file": (_replace(lambda p: p.mkdir()), "not a regular file"),
    "a pipe for a file": (_replace(lambda p: os.mkfifo(p)), "not a regular file"),
    "a dangling link": (_replace(lambda p: p.symlink_to("nowhere")), "not a regular file"),
    "nothing at all": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "a pickle that runs code": (_only("pytorch_model.bin", pickle.dumps({"w": _Evil()})),
        "no PyTorch"),
    "a .bin of noise": (_only("pytorch_model.bin", bytes(range(256)) * 9), "no PyTorch file"),
    "an empty .bin": (_only("pytorch_model.bin", b""), "no PyTorch file"),
    "a .bin index that leads out": (
        _only("pytorch_model.bin.index.json", b'{"weight_map": {"a": "../x.bin"}}'),
            "does not name files",
    ),
    "an adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json") and None, "is an adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(pack: Callable, tmp_path: Path, name: str) -> None:
    change, said = FOLDERS[name]
    random_models(tmp_path)
    for model in "abc":
        (tmp_path / model / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    change(tmp_path / "a")
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    ran = pack("merge", recipe, "-o", tmp_path / "out", cwd=tmp_path)
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err.splitlines()) <= 4
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


def test_a_header_allocates_nothing_that_it_merely_states(tmp_path: Path) -> None:
    """Within 32 MB more than it had, lengths and shapes of exabytes are harmless."""
    for number, content in enumerate(
        (
            _file({"w": GOOD}, length=2**63 - 1),
            _file({"w": GOOD}, length=MAX_HEADER_BYTES - 1),
            _file(_w(shape=[2**62, 4])),
            _file(_w(data_offsets=[0, 2**62])),
        )
    ):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from mergekit_lite.checkpoint.safetensors import SafetensorsFile\n"
        "from mergekit_lite.errors import FileFormatError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.safetensors')):\n"
        "    try: SafetensorsFile(path, path.name)\n"
        "    except FileFormatError: continue\n"
        "    sys.exit(f'{path} was accepted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
