"""Measure exports to ONNX against onnxruntime-genai's builder and optimum: `-m benchmarks.onnx`.

On the example model and on a Llama of 11 million parameters trained here, what each kind of file
costs, in bytes and in divergence on held-out text as onnxruntime runs it; on the random 1.1B shape,
time and peak memory. README.md beside this file explains the columns.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import measure, peers, report
from benchmarks.paths import REPOSITORY, WORK
from benchmarks.quantize import with_tokenizer
from benchmarks.trained import text_of, trained_model

_OUT = WORK / "out-onnx"
_EXAMPLE = REPOSITORY / "examples" / "models" / "base"
_KINDS: dict[str, list[str]] = {
    "fp32": ["fp32"], "fp16": ["fp16"], "int8": ["int8"], "int4": ["int4"],
    "int4, block 128": ["int4", "--block", "128"],
}  # fmt: skip


def pack_command(model: Path, words: list[str], output: Path) -> list[str | Path]:
    """Pack's command line."""
    scheme, *more = words
    return [
        peers.installed_pack(), "quantize", "--to", "onnx", scheme, *more, model, "-o", output,
        "-q", "--force",
    ]  # fmt: skip


def builder_command(model: Path, precision: str, output: Path) -> list[str | Path]:
    """That of onnxruntime-genai's builder, with its defaults."""
    return [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", output, "-p",
        precision, "-e", "cpu", "-c", output.parent / "cache",
    ]  # fmt: skip


def optimum_command(model: Path, output: Path) -> list[str | Path]:
    """That of optimum-cli, with its defaults; it writes float32."""
    python = peers.optimum_environment() / "bin" / "optimum-cli"
    return [python, "export", "onnx", "--model", model, "--task", "text-generation-with-past",
            "--no-post-process", output]  # fmt: skip


def qualities(name: str, model: Path) -> list[list[str]]:
    """Rows of all kinds of files of a model that has learned something."""
    calibration = ["--calibration", str(text_of("training")), "--context", "256", "--windows", "64"]
    commands = {f"pack {kind}": (words, None) for kind, words in _KINDS.items()}
    for kind in ("int4", "int4, block 128"):
        commands[f"pack {kind}, calibrated"] = ([*_KINDS[kind], *calibration], None)
    outputs: dict[str, Path] = {}
    for kind, (words, _) in commands.items():
        output = _OUT / f"{model.name}-{kind.replace(', ', '-').replace(' ', '-')}" / "model"
        measure.run(pack_command(model, words, output), output, "onnx", peers.OFFLINE)
        outputs[kind] = output
    output = _OUT / f"{model.name}-builder" / "model"
    measure.run(builder_command(model, "int4", output), output, "onnx", peers.OFFLINE)
    shutil.copy(model / "config.json", output)
    outputs["builder int4"] = output
    command: list[str | Path] = [
        peers.installed_pack(), "eval", *outputs.values(), "--reference", model, "--text",
        text_of("held-out"), "--windows", "96", "--json",
    ]  # fmt: skip
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {one["name"]: one for one in json.loads(ran.stdout)["models"]}
    rows = []
    for kind, output in outputs.items():
        one = found[str(output)]
        size = sum(file.stat().st_size for file in measure.weights(output))
        rows.append([name, kind, f"{size / 1e6:.1f} MB", f"{one['kl_mean']:.2e}",
                     f"{one['agreement']:.1%}", f"{one['tokens_per_second']:.0f}"])  # fmt: skip
    shutil.rmtree(_OUT, ignore_errors=True)
    return rows


def costs(model: Path, others: bool) -> list[list[str]]:
    """Rows of time and memory on the 1.1B shape."""
    runs: dict[str, list[str | Path]] = {}
    output = _OUT / "run" / "model"
    for kind in ("fp32", "int8", "int4"):
        runs[f"pack {kind}"] = pack_command(model, [kind], output)
        runs[f"pack {kind}, not compared"] = pack_command(model, [kind, "--no-verify"], output)
    if others:
        for precision in ("fp32", "int4"):
            runs[f"builder {precision}"] = builder_command(model, precision, output)
        runs["optimum-cli fp32"] = optimum_command(model, output)
    rows, kept = [], []
    for name, command in runs.items():
        print(f"{time.strftime('%H:%M:%S')}  1.1B: {name}", flush=True)
        run = measure.run(command, output, f"onnx-{name.replace(' ', '-')}", peers.OFFLINE)
        size = sum(file.stat().st_size for file in measure.weights(output))
        rows.append([name, f"{run.wall_s:.1f} s", f"{run.durable_s:.1f} s",
                     report.gigabytes(run.peak_rss_bytes), f"{size / 1e6:.0f} MB"])  # fmt: skip
        kept.append({"by": name, "wall_s": run.wall_s, "durable_s": run.durable_s,
                     "peak_rss_bytes": run.peak_rss_bytes, "bytes": size})  # fmt: skip
        shutil.rmtree(_OUT, ignore_errors=True)
    report.write_results(WORK / "results-onnx.json", {"runs": kept})
    return rows


def main() -> None:
    """Measure all, print tables, keep `results-onnx.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx", description=__doc__)
    parser.add_argument("--skip-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--small", action="store_true", help="leave the 1.1B shape out")
    parser.add_argument("--large", action="store_true", help="the 1.1B shape alone")
    arguments = parser.parse_args()
    print(f"\n{measure.machine()}\n")
    trained = trained_model()
    if not arguments.large:
        rows = qualities("example, 2.2M", _EXAMPLE) + qualities("trained, 11M", trained)
        head = ["model", "by", "size", "KL divergence", "same token", "tokens/s"]
        print(report.table(head, rows))
    if not arguments.small:
        rows = costs(with_tokenizer(trained), not arguments.skip_peers)
        head = ["1.1B shape", "time", "until on disk", "memory", "size"]
        print(report.table(head, rows))


if __name__ == "__main__":
    sys.exit(main())
