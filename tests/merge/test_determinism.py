"""The same bytes whatever the threads, the memory, the order of the models, and interruptions."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import digests, pack_process, random_models, write_recipe

METHODS = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
# Rows of odd lengths, a vector, a scalar, more than a million elements, several chunks.
SHAPES = {
    "embed.weight": (3001, 401),
    "layers.0.up.weight": (1300, 1001),
    "layers.0.conv.weight": (64, 33, 7),
    "layers.0.norm.weight": (70_001,),
    "layers.0.gate": (1,),
    "layers.1.up.weight": (700, 999),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models(tmp_path_factory.mktemp("models"), shapes=SHAPES, dtype=torch.bfloat16)


def _recipe(path: Path, models: Path, method: str, order: str = "abc") -> Path:
    values = {"a": 1.0, "b": 0.6, "c": 0.3}
    keys: dict[str, object] = {"dtype": "bfloat16", "seed": 3}
    if method != "linear":
        keys["base_model"] = f"{models}/base"
    if method == "slerp":
        return write_recipe(path, method, {f"{models}/a": {}}, parameters={"t": 0.35}, **keys)
    dense = {} if method in ("linear", "task_arithmetic") else {"density": 0.6}
    entries = {f"{models}/{n}": {"weight": values[n], **dense} for n in order}
    if method == "linear":
        return write_recipe(path, method, entries, **keys)
    return write_recipe(path, method, entries, parameters={"lambda": 0.9}, **keys)


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_memory_change_nothing(
    pack: Callable, tmp_path: Path, models: Path, method: str
) -> None:
    recipe = _recipe(tmp_path / "r.yaml", models, method)
    seen = []
    for number, options in enumerate(
        (
            ["--threads", 1],
            ["--threads", 2],
            ["--threads", 5],
            ["--memory", "64MB"],
            ["--memory", "4GB"],
        )
    ):
        out = tmp_path / str(number)
        ran = pack("merge", recipe, "-o", out, "-q", *options)
        assert ran.code == 0, ran.err
        seen.append(digests(out))
    assert all(found == seen[0] for found in seen)
    assert {"model.safetensors", "config.json", "pack.lock"} <= seen[0].keys()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "slerp"])
def test_the_order_of_models_changes_nothing(
    pack: Callable, tmp_path: Path, models: Path, method: str
) -> None:
    seen = []
    for order in ("abc", "cab", "bca"):
        recipe = _recipe(tmp_path / "r.yaml", models, method, order)
        assert pack("merge", recipe, "-o", tmp_path / order, "-q").code == 0
        seen.append(digests(tmp_path / order))
    assert all(found == seen[0] for found in seen)


@pytest.mark.parametrize("rescale", [False, True])
def test_global_trim_is_deterministic_too(
    pack: Callable, tmp_path: Path, models: Path, rescale: bool
) -> None:
    seen = []
    for number, threads in enumerate((1, 2)):
        recipe = write_recipe(
            tmp_path / "r.yaml", "ties", {f"{models}/{n}": {"density": 0.3} for n in "abc"},
            base_model=f"{models}/base", parameters={"trim": "global", "rescale": rescale},
            dtype="bfloat16",
        )  # fmt: skip
        out = tmp_path / str(number)
        assert pack("merge", recipe, "-o", out, "-q", "--threads", threads).code == 0
        seen.append(digests(out))
    assert seen[0] == seen[1]


def test_global_rescaling_is_by_the_norms_of_the_whole_model(
    pack: Callable, tmp_path: Path
) -> None:
    from tests.conftest import load

    folder = random_models(tmp_path, names="a")
    recipe = write_recipe(
        folder / "r.yaml", "ties", {"a": {"density": 0.3}}, base_model="base",
        parameters={"trim": "global", "rescale": True},
    )  # fmt: skip
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    base, tuned, merged = (load(folder / name) for name in ("base", "a", "out"))
    deltas = {n: (tuned[n] - base[n]).astype("float64") for n in base}
    sizes = np.sort(np.abs(np.concatenate([d.ravel() for d in deltas.values()])))
    least = sizes[-int(0.3 * sizes.size)]
    factor = sizes.sum() / sizes[sizes >= least].sum()
    for name, delta in deltas.items():
        expected = base[name] + np.where(np.abs(delta) >= least, factor * delta, 0)
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-7)


def test_one_seed_one_mask(pack: Callable, tmp_path: Path, models: Path) -> None:
    """Filtering one tensor leaves every other tensor's mask as it was; another seed does not."""
    from tests.conftest import load

    merged = {}
    for name, density, seed in (
        ("plain", 0.5, 1),
        ("filtered", [{"filter": "conv", "value": 0.1}, {"value": 0.5}], 1),
        ("other", 0.5, 2),
    ):
        recipe = write_recipe(
            tmp_path / "r.yaml", "dare_linear", {f"{models}/a": {"density": density}},
            base_model=f"{models}/base", seed=seed,
        )  # fmt: skip
        assert pack("merge", recipe, "-o", tmp_path / name, "-q").code == 0
        merged[name] = load(tmp_path / name)
    for tensor, value in merged["plain"].items():
        same = (value == merged["filtered"][tensor]).all()
        assert same == ("conv" not in tensor)
    changed = merged["plain"]["embed.weight"] != merged["other"]["embed.weight"]
    assert 0.3 < changed.mean() < 0.7


def _size(path: Path) -> int:
    """Bytes of a file that another process may remove at any moment."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


@pytest.mark.slow
def test_killed_runs_are_continued_to_the_same_bytes(tmp_path: Path, models: Path) -> None:
    """SIGKILL at ten points; nothing is under the final name until all is there.

    Every other run is killed as soon as it has finished a shard, the rest at random times.
    """
    recipe = _recipe(tmp_path / "r.yaml", models, "ties")
    words = ["merge", recipe, "--shard-size", "300kB", "--threads", 2, "-o"]
    began = time.monotonic()
    whole = pack_process(*words, tmp_path / "whole", cwd=tmp_path)
    assert whole.wait(120) == 0, whole.stderr.read() if whole.stderr else ""
    seconds = time.monotonic() - began
    expected = digests(tmp_path / "whole")
    chance = random.Random(5)
    out = tmp_path / "killed"
    journal = tmp_path / ".killed.journal"
    caught = 0
    for number in range(10):
        process = pack_process(*words, out, cwd=tmp_path)
        if number % 2:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds * chance.uniform(0.35, 0.95))
        else:
            before = _size(journal)
            while process.poll() is None:
                if _size(journal) > before:
                    caught += 1
                    break
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        if out.exists():  # it was faster than the kill, so it must be whole: begin again
            assert digests(out) == expected
            shutil.rmtree(out)
    last = pack_process(*words, out, cwd=tmp_path)
    assert last.wait(120) == 0, last.stderr.read() if last.stderr else ""
    assert digests(out) == expected
    assert caught > 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".killed")] == []


def test_a_changed_input_starts_afresh(pack: Callable, tmp_path: Path, models: Path) -> None:
    """Shards of an unfinished run are not mixed with those of other inputs."""
    from mergekit_lite.merge.run import Options, prepare
    from mergekit_lite.merge.writer import ArtifactWriter
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe

    recipe = _recipe(tmp_path / "r.yaml", models, "linear")
    prepared = prepare(read_recipe(recipe, METHODS, ALIASES), tmp_path, 10**6)
    options = Options(threads=1, shard_bytes=10**6)
    first = prepared.plan.fingerprint(prepared.inputs)
    writer = ArtifactWriter(tmp_path / "out", prepared.plan.shards, first, options.force)
    writer.done = {}
    writer.close()
    (tmp_path / ".out.journal").write_text('{"fingerprint": "another", "shards": {"x": {}}}')
    again = ArtifactWriter(tmp_path / "out", prepared.plan.shards, first, options.force)
    assert again.discarded
    assert again.done == {}
    again.close()
    prepared.inputs.close()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.up.weight": (2000, 2000) for i in range(8)}
    folder = random_models(tmp_path, shapes=shapes, dtype=torch.bfloat16)
    recipe = write_recipe(
        folder / "r.yaml", "ties", {n: {"density": 0.5} for n in "abc"}, base_model="base"
    )
    process = pack_process(
        "merge", recipe, "-o", tmp_path / "out", "--shard-size", "1MB", "--threads", 1, cwd=tmp_path
    )
    assert process.stderr is not None
    for line in process.stderr:  # wait until it merges
        if line.startswith("merge"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Run the same command to continue." in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
