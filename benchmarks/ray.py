"""A merge on one and on two workers of a Ray cluster on this machine, and in one process.

Times count from an open cluster whose workers are warm, to the published result. All runs are made
of the same models within one call, in turns; their bytes must be the same. Beside each stands what
`pack plan --engine ray` estimates for as many cores, start left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mergekit_lite.checkpoint.digest import sha256_of
from mergekit_lite.engines.local import LocalEngine
from mergekit_lite.engines.ray import RayEngine
from mergekit_lite.estimate.calibrate import calibrate, stored_of
from mergekit_lite.estimate.kinds import budget_of, kinds_of
from mergekit_lite.estimate.load import load_of
from mergekit_lite.estimate.times import Cluster, estimate_cluster
from mergekit_lite.merge.run import (
    DEFAULT_MEMORY,
    Options,
    Prepared,
    Result,
    prepare,
    run_merge,
)
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import parse_recipe

WORK = Path(__file__).parent / "work" / "ray"
TENSORS = 48
SHAPE = (2048, 4096)
RECIPE = """
merge_method: {method}
base_model: base
models:
  - {{model: a, parameters: {{weight: 1.0, density: 0.5}}}}
  - {{model: b, parameters: {{weight: 0.7, density: 0.5}}}}
  - {{model: c, parameters: {{weight: 0.4, density: 0.5}}}}
dtype: float16
seed: 1
"""


def make_models() -> None:
    """Write a base and three fine-tunes in float16, 805 MB each."""
    random = np.random.default_rng(0)
    base = [random.standard_normal(SHAPE, np.float32) * 0.02 for _ in range(TENSORS)]
    for name in ("base", "a", "b", "c"):
        folder = WORK / name
        if (folder / "config.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        change = 0.0 if name == "base" else 0.003
        save_file(
            {
                f"layers.{i}.up.weight": (
                    t + change * random.standard_normal(SHAPE, np.float32)
                ).astype(np.float16)
                for i, t in enumerate(base)
            },
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text('{"num_hidden_layers": 16}')


def planned(method: str) -> Prepared:
    """The merge, a file for each tensor."""
    recipe = parse_recipe(RECIPE.format(method=method), "ray.yaml", "ray", METHODS, ALIASES, None)
    return prepare(recipe, WORK, int(2 * np.prod(SHAPE, dtype=int)))


def merge(method: str, engine: LocalEngine | RayEngine, threads: int) -> Result:
    """Merge once; every input and output is in the page cache or hashed before."""
    out = WORK / "out"
    shutil.rmtree(out, ignore_errors=True)
    return run_merge(planned(method), out, Options(threads, engine=engine))


def estimated(method: str, workers: int) -> float:
    """Seconds that a cluster of so many cores is estimated to take, from measurements of now."""
    began = time.process_time()
    prepared = planned(method)
    planning = time.process_time() - began
    try:
        held = budget_of(prepared.plan, DEFAULT_MEMORY, 1)
        kinds = kinds_of(prepared.plan, prepared.inputs, held)
        rates = calibrate(kinds, held, workers, WORK)
        load = load_of(kinds, rates, stored_of(prepared.inputs), planning=planning)
    finally:
        prepared.inputs.close()
    # Everything lies in the page cache, so no disk is waited for.
    found = estimate_cluster(load, Cluster(1, workers, network=1e12))
    return found.seconds - found.start


def digest() -> list[str]:
    """Of every file of the result."""
    return [sha256_of(path) for path in sorted((WORK / "out").iterdir())]


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ties", choices=["ties", "dare_ties"])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    make_models()
    seconds: dict[str, list[float]] = {}
    expected: dict[str, list[float]] = {}
    bytes_of: set[tuple[str, ...]] = set()

    def note(name: str, result: Result) -> None:
        seconds.setdefault(name, []).append(result.seconds)
        bytes_of.add(tuple(digest()))

    merge(asked.method, LocalEngine(), 1)
    for _ in range(asked.rounds):
        note("one process, 1 thread", merge(asked.method, LocalEngine(), 1))
        for workers in (1, 2):
            name = f"Ray, {workers} worker{'s' * (workers > 1)}"
            expected.setdefault(name, []).append(estimated(asked.method, workers))
            ray.init(address="local", num_cpus=workers, log_to_driver=False,
                     logging_level="ERROR", include_dashboard=False,
                     object_store_memory=10**8)  # fmt: skip
            with RayEngine(threads=1) as engine:
                merge(asked.method, engine, 1)  # workers start and load their libraries
                note(name, merge(asked.method, engine, 1))
            ray.shutdown()
    one = statistics.median(seconds["Ray, 1 worker"])
    print(f"{asked.method}, {TENSORS} files of {2 * np.prod(SHAPE) / 1e6:.0f} MB")
    for name, values in seconds.items():
        median = statistics.median(values)
        said = ""
        if name in expected:
            guess = statistics.median(expected[name])
            said = f"  estimated {guess:.2f} s, {guess / median:.2f} of it"
        print(f"{name:<24}{median:7.2f} s  ({min(values):.2f}-{max(values):.2f})  "
              f"{one / median:.2f} × one worker{said}")  # fmt: skip
    print(f"same bytes: {'yes' if len(bytes_of) == 1 else 'NO'}")


if __name__ == "__main__":
    main()
