"""A merge on one and on two workers of a Ray cluster on this machine, and in one process.

Times count from an open cluster whose workers are warm, to the published result. All runs are made
of the same models within one call, in turns; their bytes must be the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mergekit_lite.checkpoint.digest import sha256_of
from mergekit_lite.engines.local import LocalEngine
from mergekit_lite.engines.ray import RayEngine
from mergekit_lite.merge.run import Options, Result, prepare, run_merge
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


def merge(method: str, engine: LocalEngine | RayEngine, threads: int) -> Result:
    """Merge once; every input and output is in the page cache or hashed before."""
    recipe = parse_recipe(RECIPE.format(method=method), "ray.yaml", "ray", METHODS, ALIASES, None)
    out = WORK / "out"
    shutil.rmtree(out, ignore_errors=True)
    shard = 2 * np.prod(SHAPE, dtype=int)
    return run_merge(prepare(recipe, WORK, int(shard)), out, Options(threads, engine=engine))


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
    bytes_of: set[tuple[str, ...]] = set()

    def note(name: str, result: Result) -> None:
        seconds.setdefault(name, []).append(result.seconds)
        bytes_of.add(tuple(digest()))

    merge(asked.method, LocalEngine(), 1)
    for _ in range(asked.rounds):
        note("one process, 1 thread", merge(asked.method, LocalEngine(), 1))
        for workers in (1, 2):
            ray.init(address="local", num_cpus=workers, log_to_driver=False,
                     logging_level="ERROR", include_dashboard=False,
                     object_store_memory=10**8)  # fmt: skip
            with RayEngine(threads=1) as engine:
                merge(asked.method, engine, 1)  # workers start and load their libraries
                note(f"Ray, {workers} worker{'s' * (workers > 1)}", merge(asked.method, engine, 1))
            ray.shutdown()
    one = statistics.median(seconds["Ray, 1 worker"])
    print(f"{asked.method}, {TENSORS} files of {2 * np.prod(SHAPE) / 1e6:.0f} MB")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<24}{median:7.2f} s  ({min(values):.2f}-{max(values):.2f})  "
              f"{one / median:.2f} × one worker")  # fmt: skip
    print(f"same bytes: {'yes' if len(bytes_of) == 1 else 'NO'}")


if __name__ == "__main__":
    main()
