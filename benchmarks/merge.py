"""Measure pack against mergekit and against the floor: `python -m benchmarks.merge`.

README.md beside this file explains the options and the columns.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure, peers, report
from benchmarks.paths import WORK
from benchmarks.recipes import JOBS, Job
from benchmarks.shapes import TINY, TINYLLAMA, make_family, read_header, repeat_layers

SHAPES = {"tinyllama": TINYLLAMA, "tiny": TINY}
Command = Callable[[str, Path, Path], list[str | Path]]  # of a method, a recipe, an output
DEEPER = 4  # how many times more layers the large family has


@dataclass(frozen=True)
class Bench:
    """What all merges of one run of the benchmark share.

    Attributes:
        family: Model name to folder.
        tiny: The same of the models that warm a program up.
        name: Name of the shape, part of the names of files.
        pack: How to start pack.
        repeat: How often pack merges.
        mergekit: The peer's environment, None to skip it.
        earlier: What an earlier run kept of each method on this machine with the same models.
    """

    family: dict[str, Path]
    tiny: dict[str, Path]
    name: str
    pack: peers.Pack
    repeat: int
    mergekit: Path | None
    earlier: dict[str, Any]

    def recipe(self, job: Job) -> Path:
        """Write a job's recipe and return its path."""
        folder = WORK / "recipes"
        folder.mkdir(exist_ok=True)
        file = folder / f"{self.name}-{job.method}.yaml"
        file.write_text(job.recipe(self.family, "bfloat16"))
        return file

    def merge(self, job: Job) -> report.Result:
        """Measure one merge with both programs, the floor beside each repetition of pack's."""
        recipe = self.recipe(job)
        inputs = [self.family[name] for name in job.inputs()]
        output_bytes = _size(self.family["base"])
        peer = self._mergekit(job, recipe)
        kept = self.earlier.get(job.method, {}).get("mergekit") if peer is None else None
        output = WORK / "out-pack" / "merged"
        runs, floors = [], []
        for number in range(self.repeat):
            _say(f"{job.method}: floor and pack, {number + 1} of {self.repeat}")
            floors.append(measure.floor(inputs, output_bytes))
            self._warm_up(self.pack.command, job)
            command = self.pack.command(job.method, recipe, output)
            log = f"{self.name}-{job.method}-pack"
            runs.append(measure.run(command, output, log, peers.OFFLINE, hashed=True))
            _check(output, self.family["base"])
            shutil.rmtree(output.parent)
        floors.append(measure.floor(inputs, output_bytes))
        return report.Result(
            method=job.method,
            models=len(inputs),
            input_bytes=sum(map(_size, inputs)),
            output_bytes=output_bytes,
            pack=runs,
            floors=floors,
            mergekit=measure.Run(**kept) if kept else peer,
            mergekit_is_old=bool(kept),
        )

    def _mergekit(self, job: Job, recipe: Path) -> measure.Run | None:
        if self.mergekit is None:
            return None
        environment = self.mergekit
        _say(f"{job.method}: mergekit")

        def command(_: str, recipe: Path, output: Path) -> list[str | Path]:
            return peers.mergekit_command(environment, recipe, output)

        self._warm_up(command, job)
        output = WORK / "out-mergekit" / "merged"
        log = f"{self.name}-{job.method}-mergekit"
        run = measure.run(command(job.method, recipe, output), output, log, peers.OFFLINE)
        _check(output, self.family["base"])
        shutil.rmtree(output.parent)
        return run

    def _warm_up(self, command: Command, job: Job) -> None:
        """Let a program merge tiny models, so that its own files are in the page cache too."""
        recipe, output = WORK / "recipes" / "warm-up.yaml", WORK / "out-warm-up" / "merged"
        recipe.write_text(job.recipe(self.tiny, "bfloat16"))
        measure.run(command(job.method, recipe, output), output, "warm-up", peers.OFFLINE)
        shutil.rmtree(output.parent)

    def peak(self, method: str) -> measure.Run:
        """Run pack once, for its memory."""
        job, output = JOBS[method], WORK / "out-pack" / "merged"
        command = self.pack.command(method, self.recipe(job), output)
        run = measure.run(command, output, f"{self.name}-{method}-pack", peers.OFFLINE)
        _check(output, self.family["base"])
        shutil.rmtree(output.parent)
        return run


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in measure.weights(folder))


def _check(output: Path, base: Path) -> None:
    """Refuse an output that lacks a tensor or holds one of another shape or type."""

    def held(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            name: (entry["dtype"], tuple(entry["shape"]))
            for file in measure.weights(folder)
            for name, entry in read_header(file)[1].items()
        }

    if held(output) != held(base):
        raise SystemExit(f"{output.name}: not the tensors of the base; compare the headers")


def measure_growth(bench: Bench, shape_name: str) -> dict[str, Any]:
    """Compare pack's memory for TIES on the models and on models several times deeper.

    The deeper models are written before and deleted after.
    """
    small = bench.peak("ties")
    root = WORK / f"{shape_name}-x{DEEPER}"
    partial = root.with_name(root.name + ".partial")
    _say(f"large: writing models with {DEEPER} times the layers")
    try:
        family = repeat_layers(WORK / shape_name, root, SHAPES[shape_name], DEEPER)
        _say("large: pack ties")
        name = f"{bench.name}-x{DEEPER}"
        large = Bench(family, bench.tiny, name, bench.pack, 1, None, {}).peak("ties")
        sizes = [_size(bench.family["base"]), _size(family["base"])]
    finally:
        for folder in (root, partial, WORK / "out-pack"):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "times": DEEPER,
        "model_bytes": sizes,
        "wall_s": [small.wall_s, large.wall_s],
        "peak_rss_bytes": [small.peak_rss_bytes, large.peak_rss_bytes],
        "peak_anonymous_bytes": [small.peak_anonymous_bytes, large.peak_anonymous_bytes],
        "rss_ratio": large.peak_rss_bytes / small.peak_rss_bytes,
    }


def _growth_table(growth: dict[str, Any]) -> str:
    rows = [
        [
            f"{report.gigabytes(size)} each",
            f"{wall:.1f} s",
            report.gigabytes(rss),
            report.gigabytes(anonymous),
        ]
        for size, wall, rss, anonymous in zip(
            growth["model_bytes"],
            growth["wall_s"],
            growth["peak_rss_bytes"],
            growth["peak_anonymous_bytes"],
            strict=True,
        )
    ]
    text = report.table(["ties, 4 models of", "pack", "memory", "of which anonymous"], rows)
    return f"{text}\nmemory grows by {growth['rss_ratio']:.2f}x for {growth['times']}x the layers"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(JOBS),
        metavar="METHODS",
        help=f"methods separated by commas; all: {','.join(JOBS)}",
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of pack, default 3")
    parser.add_argument("--skip-peers", action="store_true", help="leave mergekit out")
    parser.add_argument("--large", action="store_true", help="also 4 times deeper models (40 GB)")
    parser.add_argument(
        "--shape", choices=SHAPES, default="tinyllama", help="tiny tries the benchmark itself out"
    )
    parser.add_argument("--threads", help="passed to pack")
    parser.add_argument("--memory", help="passed to pack")
    parser.add_argument(
        "--rehash", action="store_true", help="let pack hash inputs that it has hashed before"
    )
    parser.add_argument(
        "--pack", type=Path, default=peers.installed_pack(), help="the pack command to measure"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(JOBS):
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; known: {', '.join(JOBS)}")
    if arguments.repeat < 1:
        parser.error("--repeat is at least 1")
    return arguments


def main() -> None:
    """Measure what the command line asks for, print the tables, keep `results.json`."""
    arguments = _arguments()
    WORK.mkdir(exist_ok=True)
    shape = SHAPES[arguments.shape]
    family = make_family(WORK / arguments.shape, shape, "BF16")
    suffix = "" if arguments.shape == "tinyllama" else f"-{arguments.shape}"
    kept = WORK / f"results{suffix}.json"
    environment = None if arguments.skip_peers else peers.mergekit_environment()
    here = measure.machine()
    earlier = report.read_results(kept)
    comparable = earlier.get("machine") == here.as_dict()
    options = [
        part
        for name in ("threads", "memory")
        if (value := getattr(arguments, name))
        for part in (f"--{name}", value)
    ] + ["--rehash"] * arguments.rehash
    bench = Bench(
        family=family,
        tiny=make_family(WORK / "tiny", TINY, "BF16"),
        name=arguments.shape,
        pack=peers.Pack(arguments.pack, options),
        repeat=arguments.repeat,
        mergekit=environment,
        earlier=earlier.get("merges", {}) if comparable else {},
    )
    versions = {"pack": peers.pack_versions()} | (
        {"mergekit": peers.mergekit_versions(environment)}
        if environment
        else {"mergekit": earlier["versions"]["mergekit"]}
        if comparable and "mergekit" in earlier.get("versions", {})
        else {}
    )
    content: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": here.as_dict(),
        "versions": versions,
        "parameters": shape.parameters(),
        "options": options,
        "merges": dict(bench.earlier),
    }
    results = []
    for method in arguments.only:
        with measure.kept_warm([family[name] for name in JOBS[method].inputs()]):
            results.append(bench.merge(JOBS[method]))
        content["merges"][method] = results[-1].as_dict() | {"date": content["date"]}
        report.write_results(kept, content)
    if arguments.large:
        content["growth"] = measure_growth(bench, arguments.shape)
        report.write_results(kept, content)

    print(f"\n{here}")
    for program, found in versions.items():
        print(f"{program}: " + ", ".join(f"{name} {number}" for name, number in found.items()))
    hashes = "every run hashes its inputs" if arguments.rehash else "digests of inputs are known"
    print(f"pack: {hashes}")
    print(f"Llama of {shape.parameters() / 1e6:.0f} million parameters, bf16, page cache warm\n")
    print(report.time_table(results) + "\n\n" + report.memory_table(results))
    print("".join(f"\nwarning: {line}" for line in report.cold_runs(results)))
    if arguments.large:
        print("\n" + _growth_table(content["growth"]))
    if any(result.same_bits is False for result in results):
        raise SystemExit("repeated runs of pack wrote different bytes")


if __name__ == "__main__":
    main()
