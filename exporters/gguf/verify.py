"""Is a GGUF file the model that it was made of? Asked of llama.cpp, or else of its own bytes.

With llama.cpp (the extra ``llama-cpp``) and transformers: both tokenize difficult texts, both
compute next-token distributions on them, and their divergence is reported. Without: the file's
tensors are dequantized and compared with the model's. A lock says which of the two was done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf import llama
from exporters.gguf.difficult import TEXTS
from exporters.gguf.export import GgufModel
from exporters.gguf.write import Kinds
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.checkpoint.header import write_header
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.cast import decode
from mergekit_lite.merge.model import WholeModel
from mergekit_lite.merge.run import Progress

__all__ = ["SMALL", "Verification", "is_verified", "verify"]

SMALL = 150_000_000
"""Weights of a model that is verified without being asked."""

_TOKENS = 128
_FINE = ("F32", "F16", "BF16", "Q8_0")
_FINE_DIVERGENCE = 0.1
_LARGEST_ERROR = 0.8


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        by: ``llama.cpp`` with the version of its wheel, or ``dequantizing``.
        divergence: Mean Kullback-Leibler divergence of the file's next-token distributions from the
            model's, in nats; None if they were not computed.
        agreement: Share of positions at which the likeliest token is the same.
        positions: Number of positions.
        texts: Number of texts that were tokenized by both.
        differing: The texts that got other tokens.
        error: Largest relative root mean square error of a tensor, by dequantizing.
        note: What could not be compared, and why.
    """

    by: str
    divergence: float | None = None
    agreement: float | None = None
    positions: int = 0
    texts: int = 0
    differing: tuple[str, ...] = ()
    error: float | None = None
    note: str = ""

    def describe(self) -> dict[str, Any]:
        """As data for a lock."""
        if self.error is not None:
            return {"by": self.by, "largest_relative_error": _short(self.error)}
        return {
            "by": self.by,
            "divergence": None if self.divergence is None else _short(self.divergence),
            "top_token_agreement": self.agreement,
            "positions": self.positions,
            "texts": self.texts,
            "note": self.note,
            "texts_tokenized_otherwise": list(self.differing),
        }

    def line(self) -> str:
        """In one line for a person."""
        if self.error is not None:
            return f"verified by {self.by}: largest error of a tensor {self.error:.2%}"
        parts = []
        if self.divergence is not None:
            parts.append(
                f"KL divergence {self.divergence:.2e}, the same top token at "
                f"{self.agreement:.1%} of {self.positions} positions"
            )
        same = self.texts - len(self.differing)
        parts.append(
            f"tokenization not compared ({self.note})"
            if self.note
            else f"{same} of {self.texts} difficult texts tokenized alike"
        )
        return f"verified by {self.by}: {'; '.join(parts)}"


def _short(number: float) -> float:
    """Few digits: the rest depends on the machine's libraries, and a lock should not."""
    return float(f"{number:.2e}")


def is_verified(gguf: GgufModel, wanted: bool | None) -> bool:
    """Whether files of a model are verified.

    Args:
        gguf: The model under GGUF's names.
        wanted: What was asked for; None for small models only.
    """
    elements = sum(gguf.tensors.spec(name).elements for name in gguf.names)
    return elements <= SMALL if wanted is None else wanted


def verify(
    model: WholeModel,
    gguf: GgufModel,
    files: Sequence[Path],
    kinds: Sequence[Kinds],
    wanted: bool | None,
    progress: Progress,
) -> list[Verification | None]:
    """Verify files that were just written.

    Args:
        model: What they were made of.
        gguf: The same under GGUF's names.
        files: Each file, or its first part.
        kinds: Types of their tensors.
        wanted: Whether to verify; None for small models only.
        progress: Told how far it is.

    Raises:
        PackError: A file cannot be loaded, or computes something else than the model.
    """
    if not is_verified(gguf, wanted):
        return [None for _ in files]
    progress.begin("Verify", 0)
    running = all(find_spec(name) is not None for name in ("xllamacpp", "torch", "transformers"))
    why = ""
    if running and gguf.generates and not isinstance(model.checkpoint, GgufCheckpoint):
        try:
            with tempfile.TemporaryDirectory(prefix="pack-") as scratch:
                reference = _computed(_folder(model, Path(scratch)))
        except PackError:
            raise
        except Exception as error:  # whatever transformers makes of a model that it cannot run
            why = f"; transformers cannot run the model: {_first_line(error)}"
        else:
            return [_by_running(reference, *pair) for pair in zip(files, kinds, strict=True)]
    return [_by_dequantizing(gguf, file, why) for file in files]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]


@dataclass(frozen=True)
class _Reference:
    """What transformers makes of the model.

    Attributes:
        ids: Of the difficult texts; empty where there is no tokenizer that transformers runs.
        tokens: Of the text whose logits are compared.
        logits: ``(tokens, vocabulary)`` float32.
        why: Why there are no ids.
    """

    ids: Sequence[Sequence[int]]
    tokens: Sequence[int]
    logits: Array
    why: str = ""


def _folder(model: WholeModel, scratch: Path) -> Path:
    """The model as a folder that transformers reads; written if there is none."""
    plain = model.recipe is None and len(model.sources) == 1
    if plain and model.checkpoint.folder is not None and "config.json" in model.files:
        return model.checkpoint.folder
    for name, content in model.files.items():
        if not name.endswith(".safetensors.index.json"):
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    _write(model.checkpoint, scratch / "model.safetensors")
    return scratch


def _write(checkpoint: Checkpoint, path: Path) -> None:
    names = sorted(checkpoint.names(), key=lambda n: (-checkpoint.spec(n).dtype.itemsize, n))
    specs = [(name, checkpoint.spec(name)) for name in names]
    prefix, _ = write_header(((n, s.dtype, s.shape) for n, s in specs), {"format": "pt"})
    with path.open("wb") as file:
        file.write(prefix)
        for name in names:
            file.write(np.ascontiguousarray(checkpoint.read(name)).data)


def _computed(folder: Path) -> _Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids: list[list[int]] = []
    why = ""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    except Exception as error:  # a missing library, or a file that it does not read
        why = f"transformers cannot run the tokenizer: {_first_line(error)}"
    network: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    size = network.get_input_embeddings().weight.shape[0]
    every = [i for line in ids for i in line if i < size] or list(range(size))
    tokens = every[:_TOKENS]
    with torch.no_grad():
        logits = network.eval()(torch.tensor([tokens])).logits[0].float().numpy()
    return _Reference(ids, tokens, logits, why)


def _by_running(reference: _Reference, file: Path, kinds: Kinds) -> Verification:
    texts = TEXTS if reference.ids else ()
    answer = llama.ask(file, texts, reference.tokens)
    differing = tuple(
        text
        for text, ours, theirs in zip(texts, answer.tokens, reference.ids, strict=True)
        if list(ours) != list(theirs)
    )
    width = min(answer.logits.shape[1], reference.logits.shape[1])
    ours, theirs = answer.logits[:, :width], reference.logits[:, :width]
    if not np.isfinite(ours).all():
        raise PackError(
            f"{file.name}: llama.cpp computes NaN or infinity from it",
            "Try a wider type; --no-verify writes the file all the same.",
        )
    divergence = _divergence(theirs, ours)
    fine = all(kind.name in _FINE for kind in kinds.values())
    if fine and divergence > _FINE_DIVERGENCE:
        raise PackError(
            f"{file.name}: llama.cpp computes something else than the model "
            f"(KL divergence {divergence:.3g})",
            "Please report this with the model's config.json; --no-verify writes the file anyway.",
        )
    same = float(np.mean(ours.argmax(1) == theirs.argmax(1)))
    return Verification(
        f"llama.cpp (xllamacpp {llama.version()})", divergence, round(same, 4), len(ours),
        len(texts), differing, note=reference.why,
    )  # fmt: skip


def _divergence(expected: Array, found: Array) -> float:
    """Mean of KL(expected ‖ found) over positions, in nats."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _by_dequantizing(gguf: GgufModel, file: Path, why: str) -> Verification:
    """Compare every tensor, by rows, with what it was made of."""
    stored = GgufCheckpoint(file, file.name)
    largest = 0.0
    try:
        for name in gguf.names:
            error = _error(gguf.tensors, stored, name)
            if not error <= _LARGEST_ERROR:
                raise PackError(
                    f"{file.name}: '{name}' differs from the model by {error:.0%}",
                    "Please report this; --no-verify writes the file all the same.",
                )
            largest = max(largest, error)
    finally:
        stored.close()
    return Verification(f"dequantizing{why}", error=largest)


def _error(tensors: Checkpoint, stored: Checkpoint, name: str) -> float:
    expected = _floats(tensors, name)
    found = _floats(stored, name)
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size else float(abs(found).max())


def _floats(checkpoint: Checkpoint, name: str) -> Array:
    spec = checkpoint.spec(name)
    out = np.empty(spec.elements, np.float32)
    decode(checkpoint.read(name).reshape(-1), spec.dtype, out)
    return out
