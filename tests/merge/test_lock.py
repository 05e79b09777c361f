"""pack.lock: true digests, nothing private, and the same file for the same merge."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import digests, random_models, write_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_digests_are_those_of_the_files(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "ties", {"a": {}, "b": {}}, base_model="base")
    assert pack("merge", recipe, "-o", tmp_path / "out", "--shard-size", "8kB").code == 0
    lock = json.loads((tmp_path / "out" / "pack.lock").read_text())
    assert [i["model"] for i in lock["inputs"]] == ["a", "b", "base"]
    for entry in lock["inputs"]:
        real = digests(tmp_path / entry["model"])
        assert {f["path"]: f["sha256"] for f in entry["files"]} == real
    real = digests(tmp_path / "out")
    del real["pack.lock"]
    assert {f["path"]: f["sha256"] for f in lock["outputs"]} == real
    assert len([n for n in real if n.endswith(".safetensors")]) > 1
    assert str(tmp_path) not in (tmp_path / "out" / "pack.lock").read_text()


def test_files_in_another_order_than_they_are_read(pack: Callable, tmp_path: Path) -> None:
    """A digest is right even where tensors lie in an order that is not that of the merge."""
    from mergekit_lite.checkpoint.digest import sha256_of
    from mergekit_lite.checkpoint.header import write_header
    from mergekit_lite.dtypes import DTYPES

    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["layers.1.w", "z", "layers.0.w", "a"]
    prefix, _ = write_header([(n, DTYPES["F32"], (300, 500)) for n in names], {})
    (folder / "model.safetensors").write_bytes(
        prefix + torch.randn(4 * 300 * 500).numpy().tobytes()
    )
    (folder / "config.json").write_text("{}")
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", {"odd": {}})
    assert pack("merge", recipe, "-o", tmp_path / "out", "--threads", 3).code == 0
    lock = json.loads((tmp_path / "out" / "pack.lock").read_text())
    found = {f["path"]: f["sha256"] for f in lock["inputs"][0]["files"]}
    assert found["model.safetensors"] == sha256_of(folder / "model.safetensors")


def test_known_digests_are_used_and_never_stale(
    pack: Callable, tmp_path: Path, own_cache: Path
) -> None:
    random_models(tmp_path)
    file = tmp_path / "a" / "model.safetensors"
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})

    def locked() -> str:
        assert pack("merge", recipe, "-o", tmp_path / "out", "--force").code == 0
        lock = json.loads((tmp_path / "out" / "pack.lock").read_text())
        return next(f["sha256"] for f in lock["inputs"][0]["files"] if f["path"] == file.name)

    first = locked()
    assert not own_cache.exists() or not list(own_cache.rglob("*.*"))
    from mergekit_lite.checkpoint.known import KNOWN

    KNOWN.note(file.stat(), "f" * 64)  # too fresh: not remembered
    assert KNOWN.find(file.stat()) is None
    save_file({"x": torch.ones(3)}, tmp_path / "other.safetensors")
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert locked() == first


def test_chat_template_and_tokenizer_come_along(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": {"x": 0, "y": 1}}, "added_tokens": []})
        )
        (tmp_path / name / "chat_template.jinja").write_text(f"from {name}")
        (tmp_path / name / "generation_config.json").write_text("{}")
    for chat, expected in ((None, "from base"), ("a", "from a"), ("{{ x }}", "{{ x }}")):
        keys = {"chat_template": chat} if chat else {}
        recipe = write_recipe(
            tmp_path / "r.yaml", "ties", {"a": {}, "b": {}}, base_model="base", **keys
        )
        assert pack("merge", recipe, "-o", tmp_path / "out", "--force").code == 0
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == expected
        assert (tmp_path / "out" / "generation_config.json").is_file()
        assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("other", "source", "said"),
    [
        ({"x": 0, "z": 1}, None, "differ at 1 ids (id 1 is 'y' and 'z')"),
        ({"x": 0, "z": 1}, "union", "differ at 1 ids"),
        ({"x": 0, "z": 1}, "b", "differ at 1 ids"),
        ({"x": 0, "y": 1}, "c", "is not a model of this recipe"),
    ],
)
def test_vocabularies_that_disagree(
    pack: Callable, tmp_path: Path, other: dict[str, int], source: str | None, said: str
) -> None:
    random_models(tmp_path)
    for name, vocab in (("a", {"x": 0, "y": 1}), ("b", other)):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    keys = {"tokenizer_source": source} if source else {}
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}}, **keys)
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def test_union_takes_the_larger_vocabulary(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    for name, vocab in (("a", {"x": 0, "y": 1}), ("b", {"x": 0, "y": 1, "z": 2})):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    recipe = write_recipe(
        tmp_path / "r.yaml", "linear", {"a": {}, "b": {}}, tokenizer={"source": "union"}
    )
    assert pack("merge", recipe, "-o", tmp_path / "out").code == 0
    merged = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert "z" in merged["model"]["vocab"]
