"""A GGUF file that is evaluated by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporters.gguf import llama
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.measure import check_tokens
from mergekit_lite.merge.run import Progress

__all__ = ["LlamaSubject", "require_runner"]

_HELD = 512 << 20
"""Bytes of logits that llama.cpp hands over at a time."""


def require_runner(what: str) -> None:
    """Refuse where llama.cpp is not installed.

    Raises:
        PackError: It is missing.
    """
    if find_spec("xllamacpp") is None:
        raise PackError(
            f"{what}: a GGUF file is run by llama.cpp, which is not installed",
            "pip install 'pack-models[llama-cpp]'",
        )


class LlamaSubject:
    """A GGUF file, run by llama.cpp.

    Args:
        name: As the user named it.
        path: The file, or the first part of one that is split.

    Raises:
        PackError: llama.cpp is not installed.
    """

    def __init__(self, name: str, path: Path) -> None:
        require_runner(name)
        self.name = name
        self.by = f"llama.cpp (xllamacpp {llama.version()})"
        self._path = path
        self._tokens = 0
        self._seconds = 0.0
        stored = GgufCheckpoint(path, name)
        self._vocabulary = stored.spec("token_embd.weight").shape[0]
        stored.close()

    def prepare(self, batches: Sequence[Any], progress: Progress) -> None:
        """Nothing: llama.cpp loads the file when it is asked."""
        check_tokens(self.name, self._vocabulary, batches)

    def logits(self, batches: Sequence[Any]) -> Iterator[Any]:
        """Logits of every batch."""
        import torch

        context = batches[0].shape[1]
        together = max(1, _HELD // (4 * self._vocabulary * context * len(batches[0])))
        for start in range(0, len(batches), together):
            group = batches[start : start + together]
            windows = [row for batch in group for row in batch.tolist()]
            found, seconds = llama.ask_windows(self._path, windows)
            self._tokens += len(windows) * context
            self._seconds += seconds
            every = torch.from_numpy(found)
            yield from every.split([len(batch) for batch in group])

    def rate(self) -> float | None:
        """Tokens per second, reading the text."""
        return self._tokens / self._seconds if self._seconds else None

    def close(self) -> None:
        """Nothing is held."""
