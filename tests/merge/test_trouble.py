"""Full disks, missing permissions, broken data in the middle of a run: one error, nothing lost."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import digests, pack_process, random_models, write_recipe

SHAPES = {f"layers.{i}.up.weight": (600, 1000) for i in range(6)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small_is_found_before_the_run(
    pack: Callable, tmp_path: Path, small_disk: Path
) -> None:
    random_models(tmp_path, shapes=SHAPES)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    ran = pack("merge", recipe, "-o", small_disk / "out")
    assert ran.code == 1
    assert "GB free" in ran.err
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up_during_the_run(tmp_path: Path, small_disk: Path) -> None:
    """Space that another program takes meanwhile; afterwards the same command finishes."""
    random_models(tmp_path, shapes=SHAPES, dtype=torch.bfloat16)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    # The free space is checked at the start, so the disk must seem larger than it is.
    code = (
        "import shutil, sys\n"
        "shutil.disk_usage = lambda path: type('U', (), {'free': 10**12})()\n"
        "from mergekit_lite.cli import main\n"
        f"sys.argv = ['pack', 'merge', {str(recipe)!r}, '-o', {str(small_disk / 'out')!r},"
        " '--shard-size', '2MB']\n"
        "main()"
    )
    (small_disk / "other").write_bytes(bytes(4 << 20))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "the disk is full" in ran.stderr
    assert "run the same command again" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (small_disk / "out").exists()
    journal = json.loads((small_disk / ".out.journal").read_text())
    assert journal["shards"]
    (small_disk / "other").unlink()
    again = pack_process(
        "merge", recipe, "-o", small_disk / "out", "--shard-size", "2MB", cwd=tmp_path
    )
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "continuing:" in err
    whole = pack_process(
        "merge", recipe, "-o", tmp_path / "out", "--shard-size", "2MB", cwd=tmp_path
    )
    assert whole.wait(120) == 0
    assert digests(small_disk / "out") == digests(tmp_path / "out")


def _as_plain_user() -> None:
    """Give up root's right to ignore permissions (CAP_DAC_OVERRIDE), before the program starts."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    process = pack_process(
        "merge", recipe, "-o", locked / "out", cwd=tmp_path, preexec_fn=_as_plain_user
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "Permission denied" in err
    assert "-o DIR" in err
    assert "Traceback" not in err
    assert list(locked.iterdir()) == []


def test_an_input_that_is_cut_during_the_run(pack: Callable, tmp_path: Path) -> None:
    from mergekit_lite.checkpoint.locate import open_checkpoint
    from mergekit_lite.errors import PackError

    random_models(tmp_path)
    source = open_checkpoint("a", tmp_path)
    file = tmp_path / "a" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    last = max(source.checkpoint.names(), key=lambda n: (n.startswith("layers.1.up"), n))
    with pytest.raises(PackError, match=r"a/model\.safetensors"):
        source.checkpoint.read(last)


def test_an_input_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    from mergekit_lite.checkpoint.locate import open_checkpoint
    from mergekit_lite.errors import PackError

    random_models(tmp_path)
    source = open_checkpoint("a", tmp_path)
    source.checkpoint.read("embed.weight")
    file = tmp_path / "a" / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\0\0\0\0")
    os.utime(file, ns=(1, 1))
    with pytest.raises(PackError, match="changed while it was being read"):
        source.checkpoint.input_files()


def test_not_a_number_is_told(pack: Callable, tmp_path: Path) -> None:
    from tests.conftest import load, write_model

    random_models(tmp_path)
    broken = {k: torch.from_numpy(v) for k, v in load(tmp_path / "a").items()}
    broken["layers.1.up.weight"][3, 4] = float("nan")
    write_model(tmp_path / "a", broken)
    for method in ("linear", "ties", "dare_ties", "task_arithmetic"):
        keys = {} if method == "linear" else {"base_model": "base"}
        recipe = write_recipe(tmp_path / "r.yaml", method, {"a": {}, "b": {}}, **keys)
        ran = pack("merge", recipe, "-o", tmp_path / method)
        assert ran.code == 0
        assert "'layers.1.up.weight' (1 elements)" in ran.err
        lock = json.loads((tmp_path / method / "pack.lock").read_text())
        assert lock["nonfinite"] == {"layers.1.up.weight": 1}


def test_two_packs_at_one_result(pack: Callable, tmp_path: Path) -> None:
    from mergekit_lite.merge.writer import ArtifactWriter

    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    writer = ArtifactWriter(tmp_path / "out", [], "x", force=False)
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "another pack is writing it" in ran.err
    writer.close()
    assert pack("merge", recipe, "-o", tmp_path / "out").code == 0


def test_shapes_and_names_that_do_not_fit(pack: Callable, tmp_path: Path) -> None:
    from tests.conftest import write_model

    write_model(
        tmp_path / "a", {"embed.weight": torch.zeros(10, 4), "layers.0.w": torch.zeros(4, 4)}
    )
    write_model(
        tmp_path / "b", {"embed.weight": torch.zeros(12, 4), "layers.0.w": torch.zeros(4, 4)}
    )
    write_model(
        tmp_path / "c", {"embed.weight": torch.zeros(10, 4), "layers.0.v": torch.zeros(4, 4)}
    )
    write_model(
        tmp_path / "d", {"embed.weight": torch.zeros(10, 4), "layers.0.w": torch.zeros(4, 5)}
    )
    for other, said in (
        ("b", ("embed.weight: [10, 4] in a, [12, 4] in b", "vocabularies differ")),
        ("c", ("c: has no 'layers.0.w'",)),
        ("d", ("layers.0.w: [4, 4] in a, [4, 5] in d",)),
    ):
        recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, other: {}})
        ran = pack("merge", recipe, "-o", tmp_path / "out")
        assert ran.code == 1
        assert all(words in ran.err for words in said), ran.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["a", ".", "a/../a/", "link"])
def test_a_result_never_replaces_an_input(pack: Callable, tmp_path: Path, output: str) -> None:
    random_models(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    before = digests(tmp_path)
    ran = pack("merge", recipe, "-o", output, "--force", cwd=tmp_path)
    assert ran.code == 1
    said = ("would be lost", "is not a folder", "which pack did not write")
    assert any(words in ran.err for words in said)
    assert digests(tmp_path) == before


def test_the_base_under_two_names(pack: Callable, tmp_path: Path) -> None:
    """Spellings of one path are one model; a path and another path to it are an error."""
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "ties", {"./base/": {}, "a": {}}, base_model="base")
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    lock = json.loads((tmp_path / "out" / "pack.lock").read_text())
    assert [entry["model"] for entry in lock["inputs"]] == ["a", "base"]
    (tmp_path / "link").symlink_to(tmp_path / "base")
    recipe = write_recipe(tmp_path / "r.yaml", "ties", {"link": {}, "a": {}}, base_model="base")
    ran = pack("merge", recipe, "-o", tmp_path / "again")
    assert ran.code == 1
    assert "are the same model" in ran.err


def test_all_models_that_cannot_be_used(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "bb": {}, "cc": {}})
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "2 models cannot be used" in ran.err
    assert "bb: no such file or folder; did you mean 'b'?" in ran.err
    assert "cc: no such file or folder; did you mean 'c'?" in ran.err


def test_a_typo_below_a_local_folder_asks_no_hub(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path / "models")
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"models/a": {}, "models/bbb": {}})
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "models/bbb: no such file or folder" in ran.err
    assert "Hub" not in ran.err


def test_what_has_no_effect_is_said(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    weight = [{"filter": "attn", "value": 1}, {"filter": "up", "value": 0.5}, {"value": 1}]
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {"base": {"weight": 1}, "a": {"weight": weight}},
        base_model="base",
    )  # fmt: skip
    ran = pack("plan", recipe)
    assert ran.code == 0, ran.err
    assert "the filter 'attn' of 'weight' fits no tensor" in ran.out
    assert "'up'" not in ran.out
    assert "parameters of the base model base have no effect" in ran.out


def test_pointers_and_cache_folders_are_named(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    (tmp_path / "a" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    )
    cache = tmp_path / "models--x--y"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, cache.name: {}})
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "git lfs pull" in ran.err
    assert "models--x--y/snapshots/abc" in ran.err


def test_the_config_is_that_of_a_model_that_has_one(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    (tmp_path / "a" / "config.json").unlink()
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    (tmp_path / "b" / "config.json").unlink()
    ran = pack("merge", recipe, "-o", tmp_path / "again")
    assert ran.code == 0
    assert "no model has a config.json" in ran.err
