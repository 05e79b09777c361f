"""A registry of OCI artifacts on loopback: Debian's docker-registry."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

__all__ = ["OciRegistry", "registry_program"]

_BOOT = 30.0
_HASHED = "$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW"
"""The password in bcrypt, the only form that the registry takes."""
_PASSWORD = "secret"


def registry_program() -> Path:
    """The program: as installed, or unpacked from Debian's package into a cache of the tests."""
    installed = shutil.which("docker-registry")
    if installed:
        return Path(installed)
    cache = Path(tempfile.gettempdir()) / f"pack-tests-registry-{os.getuid()}"
    program = cache / "usr" / "bin" / "docker-registry"
    if program.is_file():
        return program
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        try:
            subprocess.run(["apt-get", "download", "docker-registry"], cwd=scratch, check=True,
                           capture_output=True)  # fmt: skip
            [package] = Path(scratch).glob("*.deb")
            unpacked = Path(scratch) / "unpacked"
            subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
            mine = cache.with_name(f"{cache.name}.{os.getpid()}")
            shutil.copytree(unpacked, mine)
            if not program.is_file():  # another worker may have been faster
                with contextlib.suppress(OSError):
                    mine.rename(cache)
            shutil.rmtree(mine, ignore_errors=True)
        except (OSError, ValueError, subprocess.CalledProcessError):
            pytest.skip("needs docker-registry: apt-get install docker-registry")
    return program


class OciRegistry:
    """A registry that lives as long as the ``with`` block.

    Args:
        folder: For its content.
        password: Whether only ``user`` with a password may do anything.

    Attributes:
        host: ``127.0.0.1:port``.
    """

    def __init__(self, folder: Path, password: bool = False) -> None:
        self._folder = folder
        self._password = password
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{free.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "config.yml"
        config.write_text(
            "version: 0.1\nlog: {level: error}\n"
            f"storage: {{filesystem: {{rootdirectory: {self._folder / 'content'}}}}}\n"
            f"http: {{addr: '{self.host}'}}\n{self._auth()}"
        )
        log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [registry_program(), "serve", str(config)], stdout=log, stderr=log
        )
        log.close()
        until = time.monotonic() + _BOOT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self._folder / "log").read_text())
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._process.kill()
        self._process.wait()

    def _auth(self) -> str:
        if not self._password:
            return ""
        path = self._folder / "htpasswd"
        path.write_text(f"user:{_HASHED}\n")
        return f"auth: {{htpasswd: {{realm: pack, path: {path}}}}}\n"

    def docker_config(self) -> dict[str, object]:
        """What docker login would have written."""
        told = base64.b64encode(f"user:{_PASSWORD}".encode()).decode()
        return {"auths": {self.host: {"auth": told}}}

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.host}/v2/", timeout=1).close()
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False
        return True
