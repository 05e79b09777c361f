"""PyTorch files: the same tensors as safetensors, and no code of a stranger is run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite.checkpoint.locate import open_checkpoint
from mergekit_lite.checkpoint.protocol import Checkpoint, Rows
from mergekit_lite.checkpoint.pytorch import PytorchCheckpoint
from mergekit_lite.checkpoint.safetensors import SafetensorsCheckpoint
from mergekit_lite.errors import FileFormatError, PackError
from tests.conftest import digests, random_models, write_recipe

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def state_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of every shape and layout that a state dict may hold."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 3).to(dtype)

    whole = random(9, 7)
    return {
        "matrix": random(33, 20),
        "vector": random(50),
        "cube": random(3, 5, 4),
        "scalar": random(),
        "one": random(1),
        "empty": random(0, 4),
        "empty.rows": random(4, 0),
        "shared.whole": whole,
        "shared.same": whole,
        "shared.part": whole[2:6],
        "strided.transposed": random(6, 11).T,
        "strided.columns": random(8, 9)[:, 2:5],
        "strided.steps": random(12, 4)[::3],
        "strided.vector": random(10, 3)[:, 1],
        "strided.cube": random(4, 5, 6).permute(2, 0, 1),
        "strided.repeated": random(1, 5).expand(4, 5),
        "strided.bits": _any_bits(dtype, generator)[:, 1:],
        "parameter": torch.nn.Parameter(random(4, 3), requires_grad=dtype.is_floating_point),
    }


def _any_bits(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Bits that include NaN with payloads, infinities and subnormal numbers."""
    if dtype == torch.bool:
        return torch.rand(64, 8, generator=generator) < 0.5
    shape = (4096, 4 * dtype.itemsize)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)


def save_safetensors(folder: Path, state: Mapping[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    plain = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
    save_file(plain, folder / "model.safetensors")
    return SafetensorsCheckpoint(folder)


def save_pytorch(folder: Path, state: Mapping[str, torch.Tensor], shards: int, old: bool) -> None:
    folder.mkdir()
    if shards == 1:
        torch.save(
            dict(state), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old
        )
        return
    weight_map = {
        name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin"
        for i, name in enumerate(state)
    }
    for shard in set(weight_map.values()):
        part = {n: t for n, t in state.items() if weight_map[n] == shard}
        torch.save(part, folder / shard, _use_new_zipfile_serialization=not old)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"matrix": torch.zeros(1)}, folder / "pytorch_model-of-another.bin")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_as_safetensors(
    tmp_path: Path, dtype: torch.dtype, shards: int, old: bool
) -> None:
    state = state_of(dtype)
    expected = save_safetensors(tmp_path / "safe", state)
    save_pytorch(tmp_path / "torch", state, shards, old)
    found = open_checkpoint("torch", tmp_path).checkpoint
    assert isinstance(found, PytorchCheckpoint)
    assert found.names() == expected.names() == sorted(state)
    for name in found.names():
        spec = found.spec(name)
        assert spec == expected.spec(name)
        whole = found.read(name)
        assert whole.dtype == spec.dtype.storage
        assert whole.shape == tuple(state[name].shape)
        assert whole.tobytes() == expected.read(name).tobytes()
        bits = state[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert whole.tobytes() == bits.tobytes()
        edges = sorted({0, 1, spec.rows // 3, spec.rows // 2, spec.rows - 1, spec.rows})
        for start in edges:
            for stop in edges:
                if 0 <= start <= stop <= spec.rows:
                    rows = Rows(start, stop)
                    np.testing.assert_array_equal(
                        found.read(name, rows), expected.read(name, rows), strict=True
                    )
    found.close()
    expected.close()


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {n: t.detach() for n, t in state_of(dtype).items()}
    expected = save_safetensors(tmp_path / "safe", state)
    save_pytorch(tmp_path / "torch", state, 1, old=False)
    found = open_checkpoint("torch", tmp_path).checkpoint
    for name in found.names():
        assert found.spec(name) == expected.spec(name)
        assert found.read(name).tobytes() == expected.read(name).tobytes()


def test_one_file_and_a_nested_state(tmp_path: Path) -> None:
    """A bare file, and the layout of trainers that keep the weights under ``state_dict``."""
    state = state_of(torch.float32)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.pt")
    source = open_checkpoint("x.pt", tmp_path)
    assert source.checkpoint.names() == sorted(state)
    assert source.checkpoint.folder is None
    np.testing.assert_array_equal(source.checkpoint.read("matrix"), state["matrix"].numpy())


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "m", {"a": torch.ones(2)})
    torch.save({"b": torch.ones(2)}, tmp_path / "m" / "pytorch_model.bin")
    assert open_checkpoint("m", tmp_path).checkpoint.names() == ["a"]


class Attack:
    """Makes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch '{self.trace}'",)


@pytest.mark.parametrize("kind", ["zip", "before-1.6", "pickle-2", "pickle-5", "index"])
def test_code_is_refused_and_not_run(tmp_path: Path, pack: Callable, kind: str) -> None:
    trace = tmp_path / "trace"
    state = {"layers.0.up.weight": torch.ones(4, 4), "x": Attack(trace)}
    random_models(tmp_path)
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text("{}")
    file = evil / "pytorch_model.bin"
    if kind.startswith("pickle"):
        file.write_bytes(pickle.dumps(state, protocol=int(kind[-1])))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind != "before-1.6")
    if kind == "index":
        file.rename(evil / "part.bin")
        index = {"weight_map": {"layers.0.up.weight": "part.bin"}}
        (evil / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "evil": {}})
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "is no PyTorch file of plain tensors" in ran.err
    assert "pack never unpickles code" in ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err.strip().splitlines()) == 2
    if not kind.startswith("pickle"):
        assert "it calls for posix.system" in ran.err
    assert not trace.exists()
    # The attack itself works, so that its absence above means something.
    pickle.loads(pickle.dumps(state["x"]))
    assert trace.exists()


def _cut(path: Path, old: bool = False) -> None:
    torch.save({"a": torch.ones(5000)}, path, _use_new_zipfile_serialization=not old)
    os.truncate(path, path.stat().st_size // 2)


def _no_torch_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")


BROKEN: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: None,
    "empty": lambda path: path.touch(),
    "junk": lambda path: path.write_bytes(b"\x93junk" * 99),
    "zip": _no_torch_archive,
    "cut": _cut,
    "cut-old": lambda path: _cut(path, old=True),
    "list": lambda path: torch.save([torch.ones(1)], path),
    "number": lambda path: torch.save({"a": 1}, path),
    "key": lambda path: torch.save({1: torch.ones(1)}, path),
    "module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "sparse": lambda path: torch.save({"a": torch.ones(3).to_sparse()}, path),
    "meta": lambda path: torch.save({"a": torch.ones(3, device="meta")}, path),
    "complex": lambda path: torch.save({"a": torch.ones(3, dtype=torch.complex128)}, path),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_no_state_dict(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    BROKEN[kind](path)
    with pytest.raises(FileFormatError, match=r"pytorch_model\.bin"):
        PytorchCheckpoint([path], None, str(path))


@pytest.mark.parametrize(
    "weight_map", [{}, {"a": "../x.bin"}, {"a": "/x.bin"}, {"a": 3}, {"a": ["x.bin"]}, ["x.bin"]]
)
def test_an_index_that_names_no_file_of_its_folder(tmp_path: Path, weight_map: object) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    model = tmp_path / "m"
    model.mkdir()
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileFormatError, match="weight_map"):
        open_checkpoint("m", tmp_path)


def test_a_shard_that_is_missing_and_one_that_is_twice(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": torch.ones(2)}
    save_pytorch(tmp_path / "m", state, 2, old=False)
    (tmp_path / "m" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileFormatError, match="00002-of-00002"):
        open_checkpoint("m", tmp_path)
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin"):
        torch.save(state, tmp_path / name)
    with pytest.raises(FileFormatError, match="'a' is also in another file"):
        open_checkpoint(str(tmp_path), tmp_path)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path)
    checkpoint = PytorchCheckpoint([path], None, "x")
    assert [file.path for file in checkpoint.input_files()] == ["x.bin"]
    torch.save({"a": torch.ones(9)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(PackError, match="changed while it was being read"):
        checkpoint.input_files()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_gives_the_same_bytes(
    pack: Callable, tmp_path: Path, shards: int, old: bool
) -> None:
    """Whether a model is stored as PyTorch files or as safetensors changes no bit of the result."""
    from safetensors.torch import load_file

    random_models(tmp_path, dtype=torch.bfloat16)
    models = {"a": {"weight": 0.7, "density": 0.5}, "b": {"weight": 0.6, "density": 0.4}}
    keys = {"base_model": "base", "dtype": "bfloat16"}
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models, **keys)
    assert pack("merge", recipe, "-o", tmp_path / "safe").code == 0
    for name in ("a", "base"):
        state = load_file(tmp_path / name / "model.safetensors")
        (tmp_path / name).rename(tmp_path / f"{name}.old")
        save_pytorch(tmp_path / name, state, shards, old)
        (tmp_path / name / "config.json").write_bytes(
            (tmp_path / f"{name}.old" / "config.json").read_bytes()
        )
        (tmp_path / name / "pytorch_model-of-another.bin").unlink(missing_ok=True)
    ran = pack("merge", recipe, "-o", tmp_path / "torch")
    assert ran.code == 0, ran.err
    lock = json.loads((tmp_path / "torch" / "pack.lock").read_text())
    for entry in lock["inputs"]:
        real = digests(tmp_path / entry["model"])
        real.pop("pytorch_model.bin.index.json", None)
        assert {f["path"]: f["sha256"] for f in entry["files"]} == real
    safe, torchs = digests(tmp_path / "safe"), digests(tmp_path / "torch")
    del safe["pack.lock"], torchs["pack.lock"]
    assert safe == torchs
