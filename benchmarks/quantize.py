"""Measure GPTQ and AWQ against gptqmodel and llmcompressor: `python -m benchmarks.quantize`.

Models: the example model, a Llama of 11 million parameters trained here (`benchmarks.trained`), and
the random 1.1B shape, which shows time and memory alone. All programs get the same windows of
tokens of the training text; what quantizing cost is measured by `pack eval` on held-out text.
README.md beside this file explains the columns.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure, peers, report
from benchmarks.paths import REPOSITORY, WORK
from benchmarks.shapes import TINYLLAMA, make_family
from benchmarks.trained import text_of, trained_model

_OUT = WORK / "out-quantize"
_EXAMPLE = REPOSITORY / "examples" / "models" / "base"


@dataclass(frozen=True)
class Job:
    """One model on one text.

    Attributes:
        name: For the table.
        model: Its folder.
        context: Tokens of a window.
        windows: Their number.
        bits: Of the weights.
        measured: Whether the model has learned something, so that divergence means something.
    """

    name: str
    model: Path
    context: int
    windows: int
    bits: int
    measured: bool = True


def windows_of(job: Job) -> Path:
    """The windows of tokens that pack would choose, as JSON, for the peers."""
    from mergekit_lite.evaluate.text import cut, read_text, tokenizer_of
    from mergekit_lite.merge.model import open_whole

    path = WORK / f"windows-{job.model.name}-{job.context}-{job.windows}.json"
    whole = open_whole(str(job.model))
    with tokenizer_of(whole.files, whole.reference) as tokenizer:
        text = read_text(text_of("training"))
        pieces = cut(text, tokenizer, whole.reference, job.context, job.windows)
    whole.close()
    path.write_text(json.dumps([list(map(int, ids)) for ids in pieces.ids]))
    return path


def pack_command(job: Job, kind: str, output: Path) -> list[str | Path]:
    """Pack's command line.

    Args:
        job: The model.
        kind: ``rtn``, ``gptq``, ``awq`` or ``awq nearest``.
        output: Where it goes.
    """
    target = "awq" if kind.startswith("awq") else "gptq"
    scheme = f"w{job.bits}g128" + ("-asym" if target == "awq" else "")
    command: list[str | Path] = [
        peers.installed_pack(), "quantize", "--to", target, scheme, job.model, "-o", output, "-q",
        "--force",
    ]  # fmt: skip
    if target == "awq" and job.bits != 4:
        command += ["--format", "compressed-tensors"]
    if kind == "rtn":
        return [*command, "--no-calibration"]
    more = ["--nearest"] if kind == "awq nearest" else []
    return [*command, *more, "--calibration", text_of("training"), "--context", str(job.context),
            "--windows", str(job.windows)]  # fmt: skip


def runs_of(job: Job, others: bool) -> dict[str, tuple[list[str | Path], Path]]:
    """Command lines by name, with where each writes."""
    stem = f"{job.model.name}-w{job.bits}"
    found: dict[str, tuple[list[str | Path], Path]] = {}
    kinds = ["rtn", "gptq", "awq nearest", "awq"] if job.measured else ["gptq", "awq"]
    for kind in kinds:
        output = _OUT / f"{stem}-pack-{kind.replace(' ', '-')}" / "model"
        found[f"pack {kind}"] = pack_command(job, kind, output), output
    if not others:
        return found
    windows = windows_of(job)
    for peer, methods in (("gptqmodel", ("gptq", "awq")), ("llmcompressor", ("gptq",))):
        for method in methods:
            if peer == "gptqmodel" and method == "awq" and (job.bits != 4 or not job.measured):
                continue
            output = _OUT / f"{stem}-{peer}-{method}" / "model"
            script = Path(__file__).with_name(f"quantize_{peer}.py")
            python = peers.quantizer_environment(peer) / "bin" / "python"
            found[f"{peer} {method}"] = (
                [python, script, job.model, output, windows, method, str(job.bits)], output,
            )  # fmt: skip
    return found


def divergences(job: Job, outputs: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What `pack eval` measures of all results."""
    command: list[str | Path] = [
        peers.installed_pack(), "eval", *outputs.values(), "--reference", job.model, "--text",
        text_of("held-out"), "--windows", "96", "--json",
    ]  # fmt: skip
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {one["name"]: one for one in json.loads(ran.stdout)["models"]}
    return {name: found[str(path)] for name, path in outputs.items()}


def main() -> None:
    """Measure all jobs, print a table, keep `results-quantize.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--skip-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--small", action="store_true", help="leave the 1.1B shape out")
    arguments = parser.parse_args()
    trained = trained_model()
    jobs = [
        Job(name, model, 256, 64, bits)
        for bits in (4, 3)
        for name, model in (("example, 2.2M", _EXAMPLE), ("trained, 11M", trained))
    ]
    if not arguments.small:
        jobs.append(Job("random, 1.1B", with_tokenizer(trained), 128, 16, 4, measured=False))
    rows, kept = [], []
    for job in jobs:
        measured, outputs = {}, {}
        for name, (command, output) in runs_of(job, not arguments.skip_peers).items():
            print(f"{time.strftime('%H:%M:%S')}  {job.name}, {job.bits} bits: {name}", flush=True)
            log = f"quantize-{output.parent.name}"
            environment = {**peers.OFFLINE, "GPTQMODEL_CPU_WORKERS": "2"}
            measured[name] = measure.run(command, output, log, environment)
            outputs[name] = output
        found = divergences(job, outputs) if job.measured else {}
        for name, run in measured.items():
            kl = found.get(name)
            rows.append([
                f"{job.name}, w{job.bits}g128", name, f"{run.wall_s:.1f} s",
                report.gigabytes(run.peak_rss_bytes),
                "-" if kl is None else f"{kl['kl_mean']:.2e}",
                "-" if kl is None else f"{kl['agreement']:.1%}",
            ])  # fmt: skip
            kept.append({"job": job.name, "bits": job.bits, "by": name, "wall_s": run.wall_s,
                         "peak_rss_bytes": run.peak_rss_bytes, "measured": kl})  # fmt: skip
        shutil.rmtree(_OUT, ignore_errors=True)
        report.write_results(WORK / "results-quantize.json", {"runs": kept})
    print(f"\n{measure.machine()}\n")
    head = ["model", "by", "time", "memory", "KL divergence", "same token"]
    print(report.table(head, rows))


def with_tokenizer(trained: Path) -> Path:
    """The 1.1B shape with a tokenizer beside a link to its weights."""
    base = make_family(WORK / "tinyllama", TINYLLAMA, "BF16")["base"]
    folder = WORK / "tinyllama-quantize"
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to((base / name).resolve())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
