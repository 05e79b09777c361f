"""Measure merges of adapters against mergekit and PEFT: `python -m benchmarks.adapters`.

The base is the one of `benchmarks.merge`; its three adapters are LoRA of rank 64 on all linear
layers. README.md beside this file explains the columns.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from benchmarks import measure, peers, report
from benchmarks.paths import WORK
from benchmarks.shapes import TINY, TINYLLAMA, LlamaShape, make_family, write_tensors

SHAPES = {"tinyllama": TINYLLAMA, "tiny": TINY}
RANK = 64
ALPHA = 128
FACTOR_SIGMA = 0.01  # of both factors: deltas of the size that a short fine-tuning leaves behind
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def make_adapters(base: Path, shape: LlamaShape) -> list[Path]:
    """Write three random adapters beside the base, unless they are there."""
    folders = []
    for number in (1, 2, 3):
        folder = base.parent / f"lora-{number}"
        folders.append(folder)
        if (folder / "adapter_config.json").exists():
            continue
        folder.mkdir(exist_ok=True)
        random = np.random.Generator(np.random.SFC64(number))
        tensors = {}
        for name, size in shape.tensors().items():
            module = name.removesuffix(".weight")
            if not module.endswith(_MODULES):
                continue
            for part, dimensions in (("A", (RANK, size[1])), ("B", (size[0], RANK))):
                values = random.standard_normal(math.prod(dimensions), dtype=np.float32)
                key = f"base_model.model.{module}.lora_{part}.weight"
                tensors[key] = (values * np.float32(FACTOR_SIGMA)).reshape(dimensions)
        write_tensors(folder / "adapter_model.safetensors", tensors)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
            "target_modules": list(_MODULES), "base_model_name_or_path": str(base.resolve()),
            "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "inference_mode": True,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folders


def _ties(base: Path, adapters: list[Path], file: Path) -> Path:
    content = {
        "merge_method": "ties",
        "base_model": str(base.resolve()),
        "models": [
            {
                "model": f"{base.resolve()}+{adapter.resolve()}",
                "parameters": {"weight": weight, "density": 0.5},
            }
            for adapter, weight in zip(adapters, (0.5, 0.3, 0.4), strict=True)
        ],
        "dtype": "bfloat16",
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def _run(name: str, command: list[str | Path], output: Path, times: int) -> list[measure.Run]:
    runs = []
    for number in range(times):
        print(f"{time.strftime('%H:%M:%S')}  {name}, {number + 1} of {times}", flush=True)
        runs.append(measure.run(command, output, f"adapters-{name}", peers.OFFLINE))
        shutil.rmtree(output.parent)
    return runs


def main() -> None:
    """Measure both jobs, print a table, keep `results-adapters.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--skip-peers", action="store_true", help="leave mergekit and PEFT out")
    parser.add_argument("--repeat", type=int, default=3, help="runs of pack, default 3")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    base = make_family(WORK / arguments.shape, shape, "BF16")["base"]
    adapters = make_adapters(base, shape)
    recipe = _ties(base, adapters, WORK / "recipes" / f"{arguments.shape}-adapters.yaml")
    pack = peers.installed_pack()
    output = WORK / "out-adapters" / "merged"
    jobs: dict[str, tuple[list[str | Path], list[str | Path], str]] = {}
    ours: list[str | Path] = [pack, "merge", "ties", recipe, "-o", output, "--force", "-q"]
    cache = WORK / "out-adapters" / "lora-cache"
    theirs: list[str | Path] = []
    if not arguments.skip_peers:
        environment = peers.mergekit_environment()
        theirs = peers.mergekit_command(environment, recipe, output)
        theirs += ["--lora-merge-cache", cache]
    jobs["ties of three adapters"] = (ours, theirs, "mergekit")
    one: list[str | Path] = [pack, "merge", "adapter", f"{base}+{adapters[0]}", "-o", output]
    peft: list[str | Path] = [sys.executable, "-c", _PEFT, base, adapters[0], output]
    jobs["one adapter"] = ([*one, "--force", "-q"], peft, "PEFT")
    rows, kept = [], {}
    with measure.kept_warm([base]):
        for name, (command, peer_command, peer_name) in jobs.items():
            runs = _run(f"{name}: pack", command, output, arguments.repeat)
            wall = statistics.median(run.wall_s for run in runs)
            rss = max(run.peak_rss_bytes for run in runs)
            peer = None
            if not arguments.skip_peers:
                [peer] = _run(f"{name}: {peer_name}", peer_command, output, 1)
            kept[name] = {
                "pack_s": [run.wall_s for run in runs], "pack_rss": rss, "peer": peer_name,
                "peer_s": peer and peer.wall_s, "peer_rss": peer and peer.peak_rss_bytes,
            }  # fmt: skip
            rows.append(
                [
                    name,
                    f"{wall:.1f} s",
                    report.gigabytes(rss),
                    peer_name,
                    f"{peer.wall_s:.1f} s" if peer else "-",
                    report.gigabytes(peer.peak_rss_bytes) if peer else "-",
                    f"{peer.wall_s / wall:.1f}x" if peer else "-",
                ]
            )
    report.write_results(WORK / "results-adapters.json", kept)
    head = ["merge", "pack", "memory", "peer", "time", "memory", "faster by"]
    print(f"\n{measure.machine()}\n")
    print(report.table(head, rows))


if __name__ == "__main__":
    main()
