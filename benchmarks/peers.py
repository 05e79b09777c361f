"""The programs that are compared: pack as installed here, and peers in environments of their own.

A peer gets its own virtual environment under `work/`, because its pins must not touch pack's.
"""

import shutil
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
QUANTIZERS = {"gptqmodel": "gptqmodel==7.7.0", "llmcompressor": "llmcompressor==0.14.0.1"}
# Both programs read local folders only; neither may wait for a network.
OPTIMUM = "optimum-onnx==0.1.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_REPORTED = ("mergekit", "torch", "transformers", "safetensors", "numpy")


def mergekit_environment() -> Path:
    """Install mergekit into its own environment, once; return the environment's folder."""
    known = ["-c", str(REPOSITORY / "constraints.txt")]
    return _environment("mergekit", MERGEKIT, [[*known, TORCH, MERGEKIT]])


def quantizer_environment(name: str) -> Path:
    """Install gptqmodel or llmcompressor into its own environment, once; return its folder.

    A torch that the program's own metadata refuses is replaced.
    """
    return _environment(name, QUANTIZERS[name], [[TORCH], [QUANTIZERS[name]]])


def optimum_environment() -> Path:
    """Install optimum-onnx into its own environment, once; return its folder.

    It pins transformers 4 and still exports through TorchScript.
    """
    steps = [[TORCH], [OPTIMUM, "onnxruntime==1.31.1", "onnxscript==0.7.2", "accelerate"]]
    return _environment("optimum", OPTIMUM, steps)


def _environment(name: str, package: str, steps: Sequence[Sequence[str]]) -> Path:
    """Make a virtual environment and run pip in it, once for these versions.

    Args:
        name: Of the program.
        package: What is installed, for the user.
        steps: Arguments of ``pip install``, one call after the other.
    """
    folder = WORK / f"{name}-venv"
    ready = folder / ".ready"
    want = f"{package} {TORCH}"
    if not ready.exists() or ready.read_text() != want:
        print(f"installing {package} into its own environment (2 GB, a few minutes)", flush=True)
        venv.create(folder, with_pip=True, symlinks=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        for step in steps:
            subprocess.run([*pip, "install", "--quiet", *step], check=True)
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
class LlamaCpp:
    """The two programs of llama.cpp that make a quantized file of a folder.

    Attributes:
        convert: Path of convert_hf_to_gguf.py.
        quantize: Path of llama-quantize.
    """

    convert: Path
    quantize: Path


def llama_cpp() -> LlamaCpp | None:
    """Build llama-quantize out of llama-cpp-python's source package, once.

    Returns:
        None, with a message, where there is no compiler or no cmake.
    """
    folder = WORK / "llama.cpp"
    quantize = folder / "build" / "bin" / "llama-quantize"
    if not quantize.exists():
        missing = [name for name in ("c++", "cmake", "make") if shutil.which(name) is None]
        if missing:
            print(f"no {', no '.join(missing)}: llama.cpp is left out", flush=True)
            return None
        print(f"building llama-quantize of {LLAMA_CPP} (some minutes)", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        only = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([*pip, *only, LLAMA_CPP], check=True)
        [archive] = folder.glob("llama_cpp_python-*.tar.gz")
        shutil.unpack_archive(archive, folder, filter="data")
        [source] = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
        flags = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF"]
        build = str(folder / "build")
        with (folder / "build.log").open("w") as log:
            subprocess.run(["cmake", "-S", source, "-B", build, *flags], check=True, stdout=log)
            target = ["cmake", "--build", build, "--target", "llama-quantize", "-j"]
            subprocess.run(target, check=True, stdout=log)
    [convert] = folder.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return LlamaCpp(convert, quantize)


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
