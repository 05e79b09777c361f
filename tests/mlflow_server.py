"""A server of MLflow on loopback, from the environment that `make test` installs it into."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

__all__ = ["MlflowServer"]

_BOOT = 300.0


class MlflowServer:
    """A server that lives as long as the ``with`` block.

    Args:
        folder: For its database.

    Attributes:
        address: ``mlflow://127.0.0.1:port``.
    """

    def __init__(self, folder: Path) -> None:
        own = Path(sys.prefix) / "mlflow" / "bin" / "mlflow"
        stated = os.environ.get("PACK_TESTS_MLFLOW")
        self._program = Path(stated) if stated else own
        if not self._program.is_file():
            pytest.skip("needs MLflow's server: make test installs it beside pack")
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address = f"mlflow://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        words = ["server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}",
                 "--default-artifact-root", str(self._folder / "artifacts")]  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTHON"))}
        log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [self._program, *words], stdout=log, stderr=log, cwd=self._folder, env=kept,
            start_new_session=True,
        )  # fmt: skip
        log.close()
        until = time.monotonic() + _BOOT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self._folder / "log").read_text()[-2000:])
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        os.killpg(self._process.pid, 9)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=1).close()
        except OSError:
            return False
        return True
