"""A graph of ONNX, measured on text as onnxruntime runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.onnx.session import GraphRun
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.measure import check_tokens
from mergekit_lite.merge.run import Progress, default_threads

__all__ = ["OnnxSubject"]


class OnnxSubject:
    """A decoder's graph.

    Args:
        name: As the user named it.
        path: Of the ``.onnx`` file.

    Raises:
        PackError: onnxruntime does not take it, or it gives no logits of tokens.
    """

    def __init__(self, name: str, path: Path) -> None:
        import onnxruntime

        self.name = name
        self.by = f"onnxruntime {onnxruntime.__version__}"
        self._run = GraphRun(path, _half_of_memory(), default_threads())
        self._tokens = 0
        if "logits" not in self._run.outputs or "input_ids" not in self._run.inputs:
            raise PackError(
                f"{name}: gives no logits of tokens ({', '.join(self._run.outputs[:3])})",
                "Perplexity is measured of language models.",
            )
        self._vocabulary = _vocabulary(path)

    def prepare(self, batches: Sequence[Any], progress: Progress) -> None:
        """Nothing but a look at the tokens."""
        del progress
        if self._vocabulary is not None:
            check_tokens(self.name, self._vocabulary, batches)

    def logits(self, batches: Sequence[Any]) -> Iterator[Any]:
        """Logits of every batch."""
        import torch

        for batch in batches:
            [found] = self._run.run_all([self._run.feed(batch.numpy())])
            self._tokens += batch.numel()
            yield torch.from_numpy(found["logits"].astype(np.float32, copy=False))

    def rate(self) -> float | None:
        """Tokens per second, reading the text."""
        return self._tokens / self._run.seconds if self._run.seconds else None

    def close(self) -> None:
        """Nothing is held."""


def _vocabulary(path: Path) -> int | None:
    """Number of tokens, as the config beside a graph says."""
    for folder in (path.parent, path.parent.parent):
        file = folder / "config.json"
        if file.is_file():
            stated = json.loads(file.read_text("utf-8")).get("vocab_size")
            return stated if isinstance(stated, int) else None
    return None


def _half_of_memory() -> int:
    """Bytes of weights that a session may have; larger graphs are run in pieces."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
