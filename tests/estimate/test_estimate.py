"""Estimated times: the arithmetic on rates made by hand, and what `pack plan` says of them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch

from benchmarks.hollow import trillion_shapes, write_hollow
from mergekit_lite.cli.estimating import RATE, estimate_lines
from mergekit_lite.estimate.calibrate import calibrate, known_rates, stored_of
from mergekit_lite.estimate.kinds import Kinds, budget_of, kinds_of
from mergekit_lite.estimate.load import Load, Rates, ShardLoad, Stored, load_of
from mergekit_lite.estimate.sample import Spent
from mergekit_lite.estimate.times import (
    FLUSH_BYTES,
    TASK_SECONDS,
    Cluster,
    estimate_cluster,
    estimate_local,
)
from mergekit_lite.merge.run import Prepared, prepare
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import read_recipe
from tests.conftest import random_models, write_recipe

RATES = Rates(
    elements={"ties": 1e-8}, tensor=0.0, hashing=1e-9, start=1.0, reading=2e9, writing=1e9
)
GB = 10**9


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(work: list[float], *, read: int = 4 * GB, cold: int = 0, written: int = GB) -> Load:
    """Files of so many seconds of a core, all of one size."""
    shards = [ShardLoad(f"{i}", w, read, cold, 0, written) for i, w in enumerate(work)]
    return Load(shards, RATES, 0, "ties")


def prepared(path: Path, shard_bytes: int = 2 * GB) -> Prepared:
    return prepare(read_recipe(path, METHODS, ALIASES), path.parent, shard_bytes)


def sorted_kinds(found: Prepared) -> Kinds:
    budget = budget_of(found.plan, 512 * 10**6, 1)
    return kinds_of(found.plan, found.inputs, budget)


# One machine.


def test_threads_share_all_files() -> None:
    flush = FLUSH_BYTES / 1e9
    for threads in (1, 2, 4):
        found = estimate_local(load([30.0, 10.0]), threads)
        assert found.bottleneck == "compute"
        assert found.seconds == pytest.approx(1 + 40 / threads + flush)


def test_here_a_thread_gets_a_share_of_a_core_and_on_a_cluster_all_of_it() -> None:
    busy = replace(load([10.0]), rates=replace(RATES, share=0.5, waiting=3.0))
    assert estimate_local(busy, 1).stages[0].seconds == pytest.approx(20.0)
    assert estimate_local(busy, 1).start == 3.0
    alone = estimate_cluster(busy, Cluster(1, 1, network=1e12))
    assert alone.seconds == pytest.approx(1 + 10 + TASK_SECONDS)


@pytest.mark.parametrize(
    ("given", "expected", "seconds"),
    [
        (load([1.0], cold=40 * GB), "read", 20.0),
        (load([1.0, 1.0], written=5 * GB), "hash", 10.0),
        (load([50.0]), "compute", 25.0),
    ],
)
def test_the_longest_stage_counts(given: Load, expected: str, seconds: float) -> None:
    found = estimate_local(given, 2, write=2e9)
    assert found.bottleneck == expected
    assert found.stages[0].seconds == pytest.approx(seconds)
    assert found.seconds == pytest.approx(found.start + seconds + found.flush)


def test_a_slow_disk_counts_where_it_is_stated() -> None:
    found = estimate_local(load([1.0]), 2, read=1e8, write=1e8)
    assert (found.bottleneck, found.stages[0].seconds) == ("write", pytest.approx(10.0))


def test_inputs_are_hashed_one_model_at_most_at_once() -> None:
    given = replace(load([1.0]), chain=30 * GB)
    assert estimate_local(given, 64, write=1e12).stages[0].seconds == pytest.approx(30.0)


# A cluster.


def test_makespan_is_that_of_whole_files() -> None:
    """Five files of 10 s on four slots take two rounds; the even share would be 12.5 s."""
    found = estimate_cluster(load([10.0] * 5), Cluster(2, 2, network=1e12))
    compute = found.stages[0]
    assert compute.name == "compute"
    assert compute.even == pytest.approx(12.5)
    assert compute.seconds == pytest.approx(20 + 2 * TASK_SECONDS)
    assert compute.tail == pytest.approx(7.5 + 2 * TASK_SECONDS)
    assert found.seconds == pytest.approx(1 + compute.seconds)


def test_files_go_to_the_first_free_slot() -> None:
    """In their order 9, 1, 1, 1 on two slots: the small ones all follow one another."""
    found = estimate_cluster(load([9.0, 1.0, 1.0, 1.0]), Cluster(2, 1, network=1e12))
    assert found.stages[0].seconds == pytest.approx(9 + TASK_SECONDS)


def test_more_slots_than_files_do_not_help() -> None:
    few = estimate_cluster(load([10.0] * 4), Cluster(4, 1, network=1e12))
    many = estimate_cluster(load([10.0] * 4), Cluster(400, 32, network=1e12))
    endless = estimate_cluster(load([10.0] * 4), Cluster(10**12, 10**12, network=1e12))
    assert many.seconds == pytest.approx(few.seconds) == pytest.approx(endless.seconds)


def test_threads_of_a_file_make_it_shorter() -> None:
    one = estimate_cluster(load([8.0] * 2), Cluster(1, 8, threads=1, network=1e12))
    four = estimate_cluster(load([8.0] * 2), Cluster(1, 8, threads=4, network=1e12))
    assert one.stages[0].seconds == pytest.approx(8 + TASK_SECONDS)
    assert four.stages[0].seconds == pytest.approx(2 + TASK_SECONDS)


def test_the_busiest_node_decides_for_the_network() -> None:
    """Three files on two nodes: one node takes two of them, 8 GB in at 1 GB/s."""
    found = estimate_cluster(load([0.1] * 3), Cluster(2, 4, network=1e9))
    network = found.stages[0]
    assert network.name == "network"
    assert network.seconds == pytest.approx(8.0)
    assert network.even == pytest.approx(6.0)


def test_both_directions_of_a_network_work_at_once() -> None:
    into = estimate_cluster(load([0.1], read=4 * GB, written=GB), Cluster(1, 1, network=1e9))
    out = estimate_cluster(load([0.1], read=GB, written=4 * GB), Cluster(1, 1, network=1e9))
    assert into.seconds == pytest.approx(out.seconds) == pytest.approx(5.0)


def test_what_all_nodes_share_does_not_grow_with_them() -> None:
    for nodes in (1, 8, 64):
        cluster = Cluster(nodes, 32, network=1e11, shared=1e9)
        found = estimate_cluster(load([0.1] * 64), cluster)
        assert found.bottleneck == "storage"
        assert found.stages[0].seconds == pytest.approx(64 * 5)


def test_a_disk_holds_what_goes_in_and_out() -> None:
    found = estimate_cluster(load([0.1]), Cluster(1, 1, network=1e9, disk=1e8))
    assert (found.bottleneck, found.stages[0].seconds) == ("disk", pytest.approx(50.0))
    measured = estimate_cluster(load([0.1]), Cluster(1, 1))
    assert (measured.bottleneck, measured.stages[0].seconds) == ("disk", pytest.approx(5.0))


def test_more_nodes_never_take_longer() -> None:
    files = load([float(3 + i % 7) for i in range(200)])
    times = [
        estimate_cluster(files, Cluster(n, 4, network=1e9)).seconds for n in (1, 2, 4, 8, 16, 64)
    ]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0] / 20


# What a plan costs.


def test_the_work_of_a_file_is_that_of_its_tensors(tmp_path: Path) -> None:
    random_models(tmp_path, dtype=torch.bfloat16)
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {"a": {"density": 0.5}, "b": {"density": 0.5}},
        base_model="base",
    )  # fmt: skip
    found = prepared(recipe, shard_bytes=4000)
    kinds = sorted_kinds(found)
    (kind,) = kinds.kinds.values()
    rates = replace(RATES, elements={kind.signature: 3.0}, tensor=0.5, hashing=0.25)
    stored = {name: Stored(unknown=1.0, cold=0.5) for name in found.inputs}
    reckoned = load_of(kinds, rates, stored)
    elements = 67 * 24 * 2 + 40 * 24 * 2 + 24 * 2
    assert kind.elements == elements
    assert reckoned.read == 3 * 2 * elements
    assert sum(s.cold for s in reckoned.shards) == 3 * elements
    assert reckoned.chain == 2 * elements
    assert len(reckoned.shards) > 1
    hashed = 3 * 2 * elements
    assert reckoned.work == pytest.approx(3.0 * elements + 0.5 * 6 + 0.25 * hashed)
    rest = load_of(kinds, rates, stored, done=[found.plan.shards[0].name])
    assert [s.name for s in rest.shards] == [s.name for s in found.plan.shards[1:]]
    assert rest.work == pytest.approx(reckoned.work - reckoned.shards[0].work)
    found.inputs.close()


def test_an_unknown_kind_costs_what_the_slowest_does(tmp_path: Path) -> None:
    random_models(tmp_path)
    found = prepared(write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}}))
    kinds = sorted_kinds(found)
    reckoned = load_of(kinds, replace(RATES, elements={"x": 1.0, "y": 5.0}, hashing=1e-15), {})
    assert reckoned.work == pytest.approx(5.0 * (67 * 24 * 2 + 40 * 24 * 2 + 24 * 2))
    assert list(reckoned.missing) == list(kinds.kinds)
    assert any("not measured" in line for line in estimate_local(reckoned, 1).notes)
    found.inputs.close()


def test_weights_that_differ_are_one_kind_and_densities_of_one_another(tmp_path: Path) -> None:
    random_models(tmp_path)

    def signatures(first: float, second: float, density: float) -> list[str]:
        recipe = write_recipe(
            tmp_path / "r.yaml",
            "ties",
            {"a": {"weight": first}, "b": {"weight": second}},
            base_model="base",
            parameters={"density": density},
        )
        found = prepared(recipe)
        found.inputs.close()
        return list(sorted_kinds(found).kinds)

    assert signatures(0.3, 0.4, 0.5) == signatures(0.7, 0.2, 0.9)
    assert signatures(0.3, 0.4, 0.5) != signatures(0.3, 0.4, 1.0)


def test_known_digests_are_seen(
    pack: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.checkpoint.known._SETTLED_NS", 0)
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    found = prepared(recipe)
    assert {s.unknown for s in stored_of(found.inputs).values()} == {1.0}
    found.inputs.close()
    assert pack("merge", recipe, "-o", tmp_path / "out").code == 0
    found = prepared(recipe)
    assert {s.unknown for s in stored_of(found.inputs).values()} == {0.0}
    found.inputs.close()


# Options.


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("25Gbit", 25e9 / 8), ("10Gbit/s", 10e9 / 8), ("100Mbit", 100e6 / 8), ("1GB/s", 1e9),
        ("2GB", 2e9), ("1.5 GB/s", 1.5e9), ("500MB", 5e8), ("1GiB/s", 2.0**30), ("40Gbps", 5e9),
        ("3TB/s", 3e12),
    ],
)  # fmt: skip
def test_rates_are_read(text: str, speed: float) -> None:
    assert RATE.convert(text, None, None) == pytest.approx(speed)


@pytest.mark.parametrize("text", ["", "fast", "25", "25Gb", "2gb/s", "-1GB", "0GB/s", "1GB/h"])
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="25Gbit"):
        RATE.convert(text, None, None)


def test_options_of_a_cluster_need_its_engine(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    ran = pack("plan", "--nodes", 4, recipe)
    assert ran.code == 2
    assert "--engine ray" in ran.err
    ran = pack("plan", "--engine", "ray", "--cores", 2, "--threads", 3, recipe)
    assert ran.code == 2
    assert "only 2 cores" in ran.err


# What is printed.


def test_planning_is_waited_for_once_here_and_four_times_on_a_cluster() -> None:
    given = replace(load([8.0] * 4), planning=3.0)
    here = estimate_local(given, 2)
    assert (here.planning, here.seconds) == (3.0, 1.0 + 3.0 + 16.0 + here.flush)
    there = estimate_cluster(given, Cluster(4, 1, network=1e12))
    assert there.planning == 12.0
    assert there.seconds == pytest.approx(1.0 + 12.0 + 8.0 + TASK_SECONDS)
    assert any(line.split()[:2] == ["plan", "12.0"] for line in estimate_lines(there, RATES))


def test_lines_name_bottleneck_and_reason() -> None:
    found = estimate_cluster(load([1.0] * 5), Cluster(2, 4, network=25e9 / 8))
    lines = list(estimate_lines(found, RATES))
    assert lines[0] == "time    about 4.8 s on 2 nodes of 4 cores: network"
    assert "20.0 GB in and 5.0 GB out, 2 nodes at 25 Gbit/s each way" in lines[1]
    assert "5 files over 8 slots" in lines[2]


def test_measured_once_and_then_known(
    pack: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_models(tmp_path)
    recipe = write_recipe(
        tmp_path / "r.yaml", "dare_ties", {"a": {"density": 0.5}, "b": {"density": 0.5}},
        base_model="base",
    )  # fmt: skip
    monkeypatch.setattr("mergekit_lite.estimate.sample._SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr("mergekit_lite.estimate.sample._TENSOR_ELEMENTS", 1 << 16)
    monkeypatch.setattr("mergekit_lite.estimate.calibrate._DISK_BYTES", 1 << 23)
    (tmp_path / "click.py").write_text("raise SystemExit(3)")  # the folder's own, never imported
    assert "--measure" in pack("plan", recipe, cwd=tmp_path).out
    ran = pack("plan", "--measure", recipe, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "measuring dare_ties" in ran.err
    again = pack("plan", recipe, cwd=tmp_path)
    assert again.err == ""
    (line,) = [line for line in again.out.splitlines() if line.startswith("time")]
    assert "this machine" in line
    document = json.loads(pack("plan", "--json", recipe, cwd=tmp_path).out)["estimate"]
    stages = [stage["seconds"] for stage in document["stages"]]
    around = document["start"] + document["planning"] + document["flush"]
    assert document["seconds"] == pytest.approx(around + max(stages))
    assert document["rates"]["start_seconds"] > 0.1
    assert next(iter(document["rates"]["seconds_per_element"].values())) > 0
    assert not list(tmp_path.glob(".pack-rate*"))


@pytest.mark.parametrize(
    ("method", "models", "options"),
    [
        ("linear", {"a": {"weight": 0.5}, "b": {"weight": 0.5}}, {}),
        ("slerp", {"base": {}, "a": {}}, {"base_model": "base", "parameters": {"t": 0.4}}),
        ("passthrough", {"a": {}}, {}),
        (
            "ties",
            {"a": {"density": 0.3}, "b": {"density": 0.3}},
            {"base_model": "base", "parameters": {"trim": "global"}},
        ),
    ],
)
def test_every_sort_of_method_is_measured(
    method: str,
    models: dict[str, dict[str, float]],
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random_models(tmp_path, dtype=torch.float16)
    found = prepared(write_recipe(tmp_path / "r.yaml", method, models, **options))
    found.inputs.close()
    monkeypatch.setattr("mergekit_lite.estimate.sample._SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr("mergekit_lite.estimate.sample._TENSOR_ELEMENTS", 1 << 16)
    monkeypatch.setattr("mergekit_lite.estimate.calibrate._DISK_BYTES", 1 << 23)
    monkeypatch.setattr("mergekit_lite.estimate.calibrate._start", lambda plan: Spent(0.5, 0.4))
    kinds = sorted_kinds(found)
    assert known_rates(kinds, 1) is None
    rates = calibrate(kinds, 10**8, 1, tmp_path)
    assert set(rates.elements) == set(kinds.kinds)
    assert all(0 < rate < 1e-4 for rate in rates.elements.values())
    assert known_rates(kinds, 1) == rates
    for path in (tmp_path / "cache" / "pack" / "rates").iterdir():
        path.write_text('{"other": 1.0}')
    assert known_rates(kinds, 1) is None


def test_a_folder_that_cannot_be_measured_is_named(
    pack: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    monkeypatch.setattr("mergekit_lite.estimate.calibrate.calibrate", full)
    ran = pack("plan", "--measure", recipe, cwd=tmp_path)
    assert ran.code == 1
    assert f"{tmp_path}: its disk cannot be measured (No space left on device)" in ran.err
    assert "a folder that you may write to" in ran.err


def test_tensors_without_elements_cost_next_to_nothing(tmp_path: Path) -> None:
    """There is nothing of them to measure: a merge of nothing else is reckoned all the same."""
    shapes = {"layers.0.up.weight": (0, 4), "layers.1.up.weight": (0,)}
    random_models(tmp_path, shapes=shapes)
    found = prepared(write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}}))
    found.inputs.close()
    kinds = sorted_kinds(found)
    assert not kinds.kinds
    rates = Rates(elements={}, tensor=0.5, hashing=0.0, start=0.0, reading=1.0, writing=1.0)
    assert load_of(kinds, rates, {}).work == 1.0


def test_four_models_of_a_trillion_weights_are_planned(tmp_path: Path) -> None:
    """Holes on the disk: the plan and its estimate read headers alone, in seconds."""
    shapes = trillion_shapes(experts=24)
    for name in ("base", "a", "b", "c"):
        write_hollow(tmp_path / name, shapes)
    each = {"weight": 0.5, "density": 0.5}
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {"a": each, "b": each, "c": each}, base_model="base"
    )
    code = (
        "import mergekit_lite.estimate.calibrate as c, mergekit_lite.estimate.sample as s\n"
        "s._SAMPLE_BYTES, s._TENSOR_ELEMENTS, c._DISK_BYTES = 1 << 22, 1 << 18, 1 << 23\n"
        "from mergekit_lite.cli import main; main()"
    )
    options = ["--engine", "ray", "--nodes", "64", "--cores", "32", "--network", "25Gbit"]
    ran = subprocess.run(
        [sys.executable, "-c", code, "plan", *options, str(recipe)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "reads   8.20 TB" in ran.stdout
    assert "writes  2.05 TB in 1" in ran.stdout
    assert "on 64 nodes of 32 cores" in ran.stdout
    assert "8.20 TB in and 2.05 TB out, 64 nodes at 25 Gbit/s each way" in ran.stdout
    assert "files over 2048 slots" in ran.stdout
