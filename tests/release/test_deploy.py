"""pack deploy: files that start a server, and a checklist that says what pack could tell."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.release.test_build import home

__all__ = ["home"]

Pack = Callable[..., Any]


@pytest.fixture
def built(pack: Pack, home: Path) -> Path:
    """A release with safetensors and GGUF."""
    ran = pack("build", "r.yaml", "-q", cwd=home)
    assert ran.code == 0, ran.err
    return home / "dist" / "ties-release" / "release" / "1.0.0"


def _started(folder: Path, release: Path, program: str, *words: str) -> list[str]:
    """What a script starts, with a program of that name that tells its words."""
    place = folder / "bin"
    place.mkdir()
    (place / program).write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (place / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}"}
    ran = subprocess.run([folder / "start.sh", release, *words], env=environment, check=True,
                         capture_output=True, text=True)  # fmt: skip
    return ran.stdout.splitlines()


def test_llama_cpp(pack: Pack, home: Path, built: Path) -> None:
    ran = pack("deploy", built, "--to", "llama.cpp", "--context", 256, cwd=home)
    assert ran.code == 0, ran.err
    folder = home / "dist" / "ties-release" / "deploy" / "1.0.0-llama.cpp"
    words = _started(folder, built, "llama-server", "-ngl", "9")
    assert words[:2] == ["-m", f"{built}/gguf/ties-release-Q4_K_M.gguf"]
    assert words[-4:] == ["-c", "256", "-ngl", "9"]
    docker = (folder / "Dockerfile").read_text()
    assert (
        'COPY ["gguf/ties-release-Q4_K_M.gguf", "/model/gguf/ties-release-Q4_K_M.gguf"]' in docker
    )
    assert "model.safetensors" not in docker
    checks = (folder / "CHECKLIST.md").read_text()
    assert "- [x] its format fits the target: llama.cpp reads GGUF" in checks
    assert "- [x] what quantizing did is known: KL divergence" in checks
    assert "- [ ] it is signed" in checks
    assert "- [x] the release holds, byte by byte" in checks
    assert "of context in 16 bit" in checks
    ran = pack("deploy", built, "--to", "llama.cpp", cwd=home)
    assert ran.code == 1
    assert "already exists" in ran.err
    assert pack("deploy", built, "--to", "llama.cpp", "-o", "more", cwd=home).code == 0
    assert "-c 512 " in (home / "more" / "start.sh").read_text()  # the longest of its config
    ran = pack("deploy", built, "--to", "llama.cpp", "--file", "gguf/x.gguf", "-o", "x", cwd=home)
    assert ran.code == 1
    assert "gguf/ties-release-Q8_0.gguf" in ran.err


def test_vllm(pack: Pack, home: Path, built: Path) -> None:
    image = "vllm/vllm-openai@sha256:" + "0" * 64
    ran = pack("deploy", built, "--to", "vllm", "--image", image, "-o", "there", cwd=home)
    assert ran.code == 0, ran.err
    folder = home / "there"
    assert _started(folder, built, "vllm")[:4] == [
        "serve", str(built), "--served-model-name", "ties-release",
    ]  # fmt: skip
    docker = (folder / "Dockerfile").read_text()
    assert f"FROM {image}" in docker
    assert ".gguf" not in docker
    assert "tokenizer.json" in docker
    assert "- [x] the server is pinned" in (folder / "CHECKLIST.md").read_text()


def test_what_does_not_fit(pack: Pack, home: Path) -> None:
    """A bundle of adapters is no whole model; a release without GGUF is not for llama.cpp."""
    (home / "a.yaml").write_text(
        "name: a\nversion: 1.0.0\noutput: adapters\nbase_model: examples/models/base\n"
        "models: [{model: examples/models/lora-code}]\n"
    )
    assert pack("build", "a.yaml", "-q", cwd=home).code == 0
    folder = home / "dist" / "a" / "release" / "1.0.0"
    for target in ("vllm", "llama.cpp"):
        ran = pack("deploy", folder, "--to", target, cwd=home)
        assert ran.code == 1, target
        assert "holds adapters" in ran.err
