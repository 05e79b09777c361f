"""Models that tests merge, and a way to run the command as a user does."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite import collector

pytest_plugins = ["tests.places"]

ROOT = Path(__file__).parents[1]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process; returns exit code, output and messages."""
    from mergekit_lite.cli import main

    def run(*words: object, cwd: Path | None = None) -> Ran:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["pack", *map(str, words)])
            if cwd is not None:
                patch.chdir(cwd)
            capfd.readouterr()
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            finally:
                collector.resume()
                gc.unfreeze()  # this process goes on
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


def pack_process(*words: object, cwd: Path, **options: object) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture(scope="session")
def example_models() -> Path:
    """The trained example models; made if they are not there."""
    subprocess.run([sys.executable, ROOT / "examples" / "make_models.py"], check=True)
    return ROOT / "examples" / "models"


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, object] | None = None,
    name: str = "model.safetensors",
) -> Path:
    """Write a model folder of one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"num_hidden_layers": 2}))
    return folder


def random_models(
    folder: Path,
    names: str = "abc",
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> Path:
    """Write ``base`` and fine-tunes of it with random weights; returns the folder."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {
        "embed.weight": (67, 24),
        "layers.0.up.weight": (40, 24),
        "layers.0.norm.weight": (24,),
        "layers.1.up.weight": (40, 24),
        "layers.1.norm.weight": (24,),
        "head.weight": (67, 24),
    }
    base = {n: torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}
    write_model(folder / "base", {n: t.to(dtype) for n, t in base.items()})
    for name in names:
        tuned = {n: t + torch.randn(t.shape, generator=generator) * 0.003 for n, t in base.items()}
        write_model(folder / name, {n: t.to(dtype) for n, t in tuned.items()})
    return folder


def load(path: Path) -> dict[str, Array]:
    """Read a model's tensors as float32 with the safetensors library."""
    from safetensors.torch import load_file

    found: dict[str, Array] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {k: v.float().numpy() for k, v in load_file(file).items()}
    return found


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    from mergekit_lite.checkpoint.digest import sha256_of

    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*") if p.is_file()}


def write_recipe(
    path: Path, method: str, models: Mapping[str, Mapping[str, object]], **keys: object
) -> Path:
    """Write a recipe as JSON, which is YAML."""
    document = {
        "merge_method": method,
        "models": [
            {"model": m, **({"parameters": dict(p)} if p else {})} for m, p in models.items()
        ],
        **keys,
    }
    path.write_text(json.dumps(document))
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as tables, whether they ran in workers or not."""
    titles = {
        "peft": "adapters: type, base, what became of it, largest relative difference or why",
        "combined": "adapters added: case, relative error of pack, of PEFT's add_weighted_adapter",
        "families": "GGUF: family, largest difference to transformers' logits, next tokens alike",
        "tokenizers": "GGUF: tokenizer, difficult texts that llama.cpp tokenizes alike",
        "blocks": "GGUF: type, squared error over ggml's in the mean, at worst, tensors",
    }
    tables: dict[str, set[str]] = {name: set() for name in titles}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name in tables and not str(value).endswith("\tfailed"):
                    tables[name].add(str(value))
    for name, rows in tables.items():
        if rows:
            terminalreporter.section(titles[name])
            for row in sorted(rows):
                cells = row.split("\t")
                terminalreporter.write_line(
                    "".join(f"{cell:<34}" for cell in cells[:-1]) + cells[-1]
                )
