"""The programs that are compared: pack as installed here, and peers in environments of their own.

A peer gets its own virtual environment under `work/`, because its pins must not touch pack's.
"""

import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from benchmarks.paths import REPOSITORY, WORK

MERGEKIT = "mergekit==0.1.5"
# Pinned beside the peer: left to itself pip may choose a build with gigabytes of CUDA.
TORCH = "torch==2.13.0"
# Both programs read local folders only; neither may wait for a network.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_REPORTED = ("mergekit", "torch", "transformers", "safetensors", "numpy")


def mergekit_environment() -> Path:
    """Install mergekit into its own environment, once; return the environment's folder."""
    folder = WORK / "mergekit-venv"
    ready = folder / ".ready"
    want = f"{MERGEKIT} {TORCH}"
    if not ready.exists() or ready.read_text() != want:
        print(f"installing {MERGEKIT} into its own environment (1.6 GB, a few minutes)", flush=True)
        venv.create(folder, with_pip=True, symlinks=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        known = ["-c", str(REPOSITORY / "constraints.txt")]
        subprocess.run([*pip, "install", "--quiet", *known, TORCH, MERGEKIT], check=True)
        ready.write_text(want)
    return folder


def mergekit_command(environment: Path, recipe: Path, output: Path) -> list[str | Path]:
    """Return mergekit's command line for a recipe, with its defaults."""
    return [environment / "bin" / "mergekit-yaml", recipe, output, "--quiet"]


def mergekit_versions(environment: Path) -> dict[str, str]:
    """Return the versions of what a peer's environment holds."""
    paths = [str(path) for path in environment.glob("lib/python*/site-packages")]
    found = {
        item.metadata["Name"]: item.version
        for item in metadata.distributions(path=paths)
        if item.metadata["Name"] in _REPORTED
    }
    return {name: found[name] for name in _REPORTED if name in found}


@dataclass(frozen=True)
class Pack:
    """How to start pack.

    Attributes:
        program: Path of the `pack` command.
        options: Options to add to every merge, such as `--threads 2`.
    """

    program: Path
    options: Sequence[str] = field(default=())

    def command(self, method: str, recipe: Path, output: Path) -> list[str | Path]:
        """Return the command line that merges a recipe into a folder."""
        head: list[str | Path] = [self.program, "merge", method, recipe, "-o", output]
        return [*head, "--force", "--quiet", *self.options]


def installed_pack() -> Path:
    """Return the `pack` command beside the running interpreter."""
    return Path(sys.executable).with_name("pack")


def pack_versions() -> dict[str, str]:
    """Return the versions of pack, of Python, and of what pack computes with."""
    names = ("pack-models", "numpy", "numba")
    return {name: metadata.version(name) for name in names} | {
        "python": ".".join(map(str, sys.version_info[:3]))
    }
