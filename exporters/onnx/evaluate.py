"""A graph of ONNX, measured on text as onnxruntime runs it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.onnx.session import GraphRun
from mergekit_lite.checkpoint.onnx import config_beside
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
        stated = _stated(path)
        named = stated.get("architectures")
        kinds = named if isinstance(named, list) else []
        if (
            "logits" not in self._run.outputs
            or "input_ids" not in self._run.inputs
            or (
                kinds
                and not any("CausalLM" in str(k) or "LMHead" in str(k) for k in kinds)
                and not self._run.cache.layers
            )
        ):
            raise PackError(
                f"{name}: gives no logits of the next token ({', '.join(self._run.outputs[:3])})",
                "Perplexity is measured of language models.",
            )
        size = stated.get("vocab_size")
        self._vocabulary = size if isinstance(size, int) else None

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
            if found["logits"].shape[:-1] != batch.shape:
                raise PackError(
                    f"{self.name}: gives logits {list(found['logits'].shape)} for tokens "
                    f"{list(batch.shape)}",
                    "Perplexity is measured of language models.",
                )
            self._tokens += batch.numel()
            yield torch.from_numpy(found["logits"].astype(np.float32, copy=False))

    def rate(self) -> float | None:
        """Tokens per second, reading the text."""
        return self._tokens / self._run.seconds if self._run.seconds else None

    def close(self) -> None:
        """Nothing is held."""


def _stated(path: Path) -> Mapping[str, object]:
    """The config beside a graph, or beside the folder that it is in."""
    return config_beside(path.parent) or config_beside(path.parent.parent)


def _half_of_memory() -> int:
    """Bytes of weights that a session may have; larger graphs are run in pieces."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
