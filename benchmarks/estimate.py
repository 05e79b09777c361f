"""Set the times that `pack plan` estimates against measured ones: `python -m benchmarks.estimate`.

README.md beside this file explains the cases.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import measure, peers
from benchmarks.hollow import trillion_shapes, write_hollow
from benchmarks.paths import WORK
from benchmarks.recipes import JOBS, Job
from benchmarks.report import table
from benchmarks.shapes import Dtype, LlamaShape, make_family
from mergekit_lite.estimate.calibrate import known_rates, stored_of
from mergekit_lite.estimate.kinds import budget_of, kinds_of
from mergekit_lite.estimate.load import load_of
from mergekit_lite.estimate.times import Estimate, estimate_local
from mergekit_lite.merge.run import DEFAULT_MEMORY, prepare
from mergekit_lite.merge.writer import journal_of
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import read_recipe

WITHIN = 0.25
SMALL_FILE = 60 * 10**6
SMALL_FILES = ["--shard-size", str(SMALL_FILE)]
SHAPES: dict[Dtype, LlamaShape] = {
    "BF16": LlamaShape(hidden=1024, layers=12, intermediate=2816, heads=16),
    "F32": LlamaShape(hidden=1024, layers=4, intermediate=2816, heads=16),
}
TRILLION = Job("ties", True, JOBS["ties"].models, {})


@dataclass(frozen=True)
class Case:
    """One merge that is estimated and measured.

    Attributes:
        name: As in the table.
        job: The merge.
        dtype: Of the models and of the result.
        threads: Of pack.
        rehash: Whether the digests of its inputs are not known.
        resumed: Whether a run that was stopped about half way is continued.
    """

    name: str
    job: Job
    dtype: Dtype = "BF16"
    threads: int = 2
    rehash: bool = False
    resumed: bool = False


def _fewer(job: Job, models: int) -> Job:
    return replace(job, models=dict(list(job.models.items())[:models]))


CASES = [
    Case("linear, 3 models", JOBS["linear"]),
    Case("linear, 2 models", _fewer(JOBS["linear"], 2), threads=1),
    Case("linear, 3 models, float32", JOBS["linear"], "F32"),
    Case("slerp, 2 models", JOBS["slerp"]),
    Case("slerp, 2 models", JOBS["slerp"], threads=1),
    Case("ties, 4 models", JOBS["ties"]),
    Case("ties, 4 models", JOBS["ties"], threads=1),
    Case("ties, 3 models, float32", _fewer(JOBS["ties"], 2), "F32"),
    Case("ties, 4 models, digests unknown", JOBS["ties"], rehash=True),
    Case("ties, 4 models, resumed", JOBS["ties"], resumed=True),
    Case("dare_ties, 4 models", JOBS["dare_ties"]),
    Case("dare_ties, 3 models", _fewer(JOBS["dare_ties"], 2), threads=1),
]


@dataclass(frozen=True)
class Compared:
    """A case with its times, in seconds, and the load of the machine at its start.

    ``estimated`` and ``measured`` are by the clock, the other two of processors.
    """

    case: Case
    estimated: list[float]
    measured: list[float]
    estimated_work: list[float]
    measured_work: list[float]
    bottleneck: str
    load: float

    @property
    def ratio(self) -> float:
        """Median estimate over median measurement."""
        return statistics.median(self.estimated) / statistics.median(self.measured)

    @property
    def work_ratio(self) -> float:
        """The same of processor time."""
        return statistics.median(self.estimated_work) / statistics.median(self.measured_work)

    @property
    def holds(self) -> bool:
        """Whether the estimate is within the promised share of the measurement.

        Where others keep the cores busy the clock measures them, so processor time is judged.
        """
        crowded = self.load > len(os.sched_getaffinity(0))
        return abs((self.work_ratio if crowded else self.ratio) - 1) <= WITHIN


def _pack() -> list[str]:
    return [sys.executable, "-m", "mergekit_lite"]


def _plan(recipe: Path, *options: str) -> dict[str, object]:
    """The estimate of `pack plan`."""
    command = [*_pack(), "plan", "--json", *options, str(recipe)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | peers.OFFLINE)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    estimate: dict[str, object] = json.loads(ran.stdout)["estimate"]
    return estimate


def compare(case: Case, repeat: int) -> Compared:
    """Estimate and merge in turn, so that both meet the same load.

    The digests that an earlier merge left are forgotten for a case that hashes its inputs.
    """
    family = make_family(WORK / f"estimate-{case.dtype}", SHAPES[case.dtype], case.dtype)
    folder = WORK / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / f"estimate-{case.job.method}-{case.dtype}-{len(case.job.models)}.yaml"
    recipe.write_text(case.job.recipe(family, "bfloat16" if case.dtype == "BF16" else "float32"))
    output = WORK / "out-estimate" / "merged"
    threads = ["--threads", str(case.threads)]
    merge = [*_pack(), "merge", str(recipe), "-q", "-o", str(output), *threads]
    estimated, measured, bottleneck = [], [], ""
    estimated_work, measured_work = [], []
    load = os.getloadavg()[0]
    with measure.kept_warm([family[name] for name in case.job.inputs()]):
        for number in range(repeat + 1):
            if case.rehash:
                cache = Path(os.environ["XDG_CACHE_HOME"]) / "pack" / "sha256"
                shutil.rmtree(cache, ignore_errors=True)
            if number:
                found = _plan(recipe, "--measure", *threads)
                estimated.append(float(str(found["seconds"])))
                estimated_work.append(float(str(found["work"])))
                bottleneck = str(found["bottleneck"])
            if case.resumed and number:
                expected = _resume([*merge, *SMALL_FILES], output, recipe, case.threads)
                estimated[-1], estimated_work[-1] = expected.seconds, expected.work
                before = os.times()
                subprocess.run([*merge, *SMALL_FILES], check=True, env=os.environ | peers.OFFLINE)
                after = os.times()
                seconds = after.elapsed - before.elapsed
                work = sum(after[2:4]) - sum(before[2:4])
            else:
                run = measure.run(merge, output, "estimate", peers.OFFLINE)
                seconds, work = run.wall_s, run.user_s + run.system_s
            if number:  # the first one compiles, and learns digests
                measured.append(seconds)
                measured_work.append(work)
    shutil.rmtree(output.parent)
    return Compared(case, estimated, measured, estimated_work, measured_work, bottleneck, load)


def _resume(merge: list[str], output: Path, recipe: Path, threads: int) -> Estimate:
    """Stop a merge about half way, and estimate the rest."""
    shutil.rmtree(output.parent, ignore_errors=True)
    journal = journal_of(output)
    environment = os.environ | peers.OFFLINE
    with subprocess.Popen(merge, stderr=subprocess.DEVNULL, env=environment) as half:
        while half.poll() is None and len(_finished(journal)) < 3:
            time.sleep(0.01)
        half.send_signal(signal.SIGINT)
    done = _finished(journal)
    prepared = prepare(read_recipe(recipe, METHODS, ALIASES), recipe.parent, SMALL_FILE)
    try:
        plan, inputs = prepared.plan, prepared.inputs
        kinds = kinds_of(plan, inputs, budget_of(plan, DEFAULT_MEMORY, threads))
        rates = known_rates(kinds, threads)
        if rates is None or not 0 < len(done) < len(plan.shards):
            raise SystemExit(f"could not stop {recipe.name} half way: {len(done)} files")
        expected = estimate_local(load_of(kinds, rates, stored_of(inputs), done), threads)
    finally:
        prepared.inputs.close()
    os.sync()
    return expected


def _finished(journal: Path) -> list[str]:
    try:
        return list(json.loads(journal.read_text())["shards"])
    except (OSError, ValueError):
        return []


def _row(result: Compared) -> list[str]:
    def seconds(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} s ({min(values):.1f}-{max(values):.1f})"

    return [
        result.case.name,
        str(result.case.threads),
        seconds(result.estimated),
        seconds(result.measured),
        f"{result.ratio:.2f}",
        f"{result.work_ratio:.2f}",
        result.bottleneck,
        f"{result.load:.1f}",
    ]


def plan_trillion() -> None:
    """Print the plan of four models of a trillion weights on 64 nodes."""
    root = WORK / "hollow"
    shutil.rmtree(root, ignore_errors=True)
    family = {name: root / name for name in TRILLION.inputs()}
    for path in family.values():
        write_hollow(path, trillion_shapes())
    recipe = root / "ties.yaml"
    recipe.write_text(TRILLION.recipe(family, "bfloat16"))
    began = time.perf_counter()
    cluster = ["--engine", "ray", "--nodes", "64", "--cores", "32", "--network", "25Gbit"]
    subprocess.run([*_pack(), "plan", *cluster, str(recipe)], check=True)
    print(f"planned and estimated in {time.perf_counter() - began:.1f} s")
    shutil.rmtree(root)


def main() -> None:
    """Compare the cases, print the table; exits with 1 if one is off by more than a quarter."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--repeat", type=int, default=3, help="estimates and runs of each")
    parser.add_argument("--trillion", action="store_true", help="plan 4 models of 1T weights only")
    arguments = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(WORK / "estimate-cache")
    if arguments.trillion:
        plan_trillion()
        return
    results = []
    for case in CASES:
        if arguments.only in case.name:
            results.append(compare(case, arguments.repeat))
            print(f"{time.strftime('%H:%M:%S')}  " + "  ".join(_row(results[-1])), flush=True)
    head = ["case", "threads", "estimated", "measured", "ratio", "processor", "longest", "load"]
    print(f"\n{measure.machine()}\n" + table(head, [_row(result) for result in results]))
    off = [result.case.name for result in results if not result.holds]
    if off:
        raise SystemExit(f"off by more than {WITHIN:.0%}: {'; '.join(off)}")


if __name__ == "__main__":
    main()
