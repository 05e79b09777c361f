"""Perplexity of models, and how far their predictions are from a reference's.

Perplexity is exp of the mean negative log-likelihood of every token of a window after its first
(Jelinek et al., 1977). Its interval is that of the mean over windows, by their standard error. The
divergence is Kullback and Leibler's of the model's next-token distribution from the reference's, in
nats, at every position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import ACTIVATIONS, LayerwiseModel
from mergekit_lite.evaluate.text import Windows
from mergekit_lite.merge.run import Progress

__all__ = ["LayerwiseSubject", "Measured", "Subject", "check_tokens", "measure"]

_Z95 = 1.959964
"""Standard errors on either side that hold a normal variable in 95 % of cases."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        name: As the user named it.
        by: What ran it.
        tokens: That were predicted.
        perplexity: Of them.
        low: Lower end of its 95 % interval.
        high: Upper end.
        reference: What the rest is relative to; None for the reference itself, or without one.
        perplexity_change: Relative to the reference's; 0.01 is one percent more.
        kl_mean: Mean divergence from the reference, in nats.
        kl_median: Its median.
        kl_p99: Its 99th percentile.
        agreement: Share of the positions at which both find the same token most likely.
        tokens_per_second: Where a runtime was measured; None elsewhere.
    """

    name: str
    by: str
    tokens: int
    perplexity: float
    low: float
    high: float
    reference: str | None = None
    perplexity_change: float | None = None
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    agreement: float | None = None
    tokens_per_second: float | None = None

    def describe(self) -> dict[str, Any]:
        """As data, to the digits that do not depend on a machine's libraries."""
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None and key != "tokens_per_second"
        }


class Subject(Protocol):
    """A model that gives logits."""

    name: str
    by: str

    def prepare(self, batches: Sequence[Any], progress: Progress) -> None:
        """Do what has to be done once, before the logits are asked for."""

    def logits(self, batches: Sequence[Any]) -> Iterator[Any]:
        """``(sequences, tokens, vocabulary)`` float32 tensors, one for each batch."""

    def rate(self) -> float | None:
        """Tokens per second of the runtime, if that means something."""

    def close(self) -> None:
        """Let go of all."""


class LayerwiseSubject:
    """A checkpoint, run layer by layer.

    Args:
        name: As the user named it.
        checkpoint: The model.
        dtype: That it computes with.
        device: torch's device.
        budget: Bytes of hidden states in memory.
    """

    def __init__(
        self, name: str, checkpoint: Checkpoint, dtype: str, device: str, budget: int = ACTIVATIONS
    ) -> None:
        self.name = name
        self.by = f"pack, layer by layer in {dtype}"
        self._model = LayerwiseModel(checkpoint, dtype, device, budget)
        self._kept: Any = None

    def prepare(self, batches: Sequence[Any], progress: Progress) -> None:
        """Run all layers."""
        check_tokens(self.name, self._model.vocabulary, batches)
        if self._kept is None:
            self._kept = self._model.hidden(batches, progress)

    def logits(self, batches: Sequence[Any]) -> Iterator[Any]:
        """See `Subject`."""
        return self._model.logits(batches, self._kept)

    def rate(self) -> float | None:
        """Nothing: reading layers takes the time, not the model."""
        return None

    def close(self) -> None:
        """Forget the hidden states."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def check_tokens(name: str, vocabulary: int, batches: Sequence[Any]) -> None:
    """Check that a model knows all tokens of a text.

    Raises:
        PackError: It does not.
    """
    largest = max(int(batch.max()) for batch in batches)
    if largest >= vocabulary:
        raise PackError(
            f"{name}: knows {vocabulary} tokens, the text has one of number {largest}",
            "Models are compared on one text in the tokens of the first; theirs must be alike.",
        )


def measure(
    subjects: Sequence[Subject], reference: Subject | None, windows: Windows, progress: Progress
) -> list[Measured]:
    """Measure models on one text.

    Args:
        subjects: The models.
        reference: What they are compared with; it may be one of them, and is run once.
        windows: The text.
        progress: Told how far it is.

    What was prepared for the reference stays, for the next call on the same text, until whoever
    opened it closes it.

    Returns:
        The reference first, if it is none of the models, then the models.
    """
    batches = windows.batches()
    order = [*([] if reference is None or reference in subjects else [reference]), *subjects]
    if reference is not None:
        reference.prepare(batches, progress)
    found = []
    for subject in order:
        if subject is not reference:
            subject.prepare(batches, progress)
        progress.begin("Measure", 8 * sum(batch.numel() for batch in batches))
        found.append(_measured(subject, reference, batches, progress))
        if subject is not reference:
            subject.close()
    return found


def _measured(
    subject: Subject, reference: Subject | None, batches: Sequence[Any], progress: Progress
) -> Measured:
    """One model's numbers."""
    alone = reference is None or reference is subject
    theirs = None if alone else reference.logits(batches)  # type: ignore[union-attr]
    losses: list[float] = []
    reference_losses: list[float] = []
    divergences: list[Any] = []
    same: list[Any] = []
    for batch, logits in zip(batches, subject.logits(batches), strict=True):
        losses += _losses(logits, batch)
        if theirs is not None:
            expected = next(theirs)
            reference_losses += _losses(expected, batch)
            width = min(expected.shape[-1], logits.shape[-1])
            divergence, agrees = _compared(expected[..., :width], logits[..., :width])
            divergences.append(divergence)
            same.append(agrees)
        progress.advance(8 * batch.numel())
    count = sum(int(batch[:, 1:].numel()) for batch in batches)
    mean = float(np.mean(losses))
    spread = float(np.std(losses, ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    basic = Measured(
        subject.name, subject.by, count, math.exp(mean), math.exp(mean - _Z95 * spread),
        math.exp(mean + _Z95 * spread), tokens_per_second=subject.rate(),
    )  # fmt: skip
    if reference is None or theirs is None:
        return basic
    every = np.concatenate(divergences)
    return Measured(
        **{**asdict(basic), "reference": reference.name,
           "perplexity_change": math.expm1(mean - float(np.mean(reference_losses))),
           "kl_mean": float(every.mean()), "kl_median": float(np.median(every)),
           "kl_p99": float(np.quantile(every, 0.99)),
           "agreement": float(np.concatenate(same).mean())}
    )  # fmt: skip


def _losses(logits: Any, batch: Any) -> list[float]:
    """Mean negative log-likelihood of each window."""
    import torch

    wanted = batch[:, 1:].unsqueeze(-1)
    chosen = logits[:, :-1].double()
    picked = chosen.gather(-1, wanted).squeeze(-1) - torch.logsumexp(chosen, -1)
    return [float(value) for value in -picked.mean(1)]


def _compared(expected: Any, found: Any) -> tuple[Any, Any]:
    """Divergence and agreement at every position."""
    import torch

    p = torch.log_softmax(expected.double(), -1)
    q = torch.log_softmax(found.double(), -1)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    agrees = expected.argmax(-1) == found.argmax(-1)
    return divergence.flatten().numpy(), agrees.flatten().numpy()
