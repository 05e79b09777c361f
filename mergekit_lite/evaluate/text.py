"""Text to run a model on: a file, or a small one that comes along, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.adapters.architecture import quiet
from mergekit_lite.errors import PackError

__all__ = ["Text", "Windows", "cut", "read_text", "tokenizer_of"]

_BATCH_TOKENS = 2048
_FEWEST = 2
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Text:
    """Documents to run a model on.

    Attributes:
        name: Of the file.
        sha256: Of its content.
        documents: Plain texts, or conversations: lists of messages with role and content.
    """

    name: str
    sha256: str
    documents: Sequence[str | list[dict[str, str]]]


@dataclass(frozen=True)
class Windows:
    """Token ids, all windows of one length.

    Attributes:
        ids: ``(windows, context)``.
        text: Where they come from.
        seed: Which windows were taken follows from it.
    """

    ids: Sequence[Sequence[int]]
    text: Text
    seed: int

    @property
    def context(self) -> int:
        """Tokens in each."""
        return len(self.ids[0])

    def batches(self) -> list[Any]:
        """As tensors ``(sequences, tokens)`` int64, some thousand tokens in each."""
        import torch

        size = max(1, _BATCH_TOKENS // self.context)
        return list(torch.tensor(self.ids, dtype=torch.int64).split(size))

    def describe(self) -> dict[str, Any]:
        """For a lock."""
        return {"text": self.text.name, "sha256": self.text.sha256, "windows": len(self.ids),
                "context": self.context, "seed": self.seed}  # fmt: skip


def read_text(path: Path | None) -> Text:
    """Read a text file, or JSON lines with ``text`` or ``messages``; None for the built-in one.

    Raises:
        PackError: It is not there, no UTF-8, or holds nothing.
    """
    path = path or Path(__file__).with_name("default.txt")
    try:
        if path.stat().st_size > _LARGEST:
            raise PackError(f"{path}: has more than {_LARGEST >> 20} MB", "Give a part of it.")
        raw = path.read_bytes()
        content = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(
            f"{path}: cannot be read as text ({error})", "Give text in UTF-8."
        ) from None
    digest = hashlib.sha256(raw).hexdigest()
    documents: list[str | list[dict[str, str]]] = [content]
    if path.suffix in (".jsonl", ".ndjson"):
        lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
        documents = [_document(path, number, line) for number, line in lines]
    documents = [document for document in documents if document]
    if not documents or all(isinstance(d, str) and not d.strip() for d in documents):
        raise PackError(f"{path}: holds no text", "Give a file with text.")
    return Text(path.name, digest, documents)


def _document(path: Path, number: int, line: str) -> str | list[dict[str, str]]:
    try:
        found = json.loads(line)
        if isinstance(found.get("text"), str):
            return str(found["text"])
        messages = found["messages"]
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PackError(
            f"{path}, line {number}: has neither 'text' nor 'messages' with role and content",
            'Write {"text": "…"} or {"messages": [{"role": "user", "content": "…"}]}.',
        ) from None


@contextmanager
def tokenizer_of(files: Mapping[str, bytes], label: str) -> Iterator[Any]:
    """A model's tokenizer, as transformers has it; no code that comes with a model is run.

    Args:
        files: The model's small files, by name.
        label: What the user called the model.

    Raises:
        PackError: It has none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="pack-") as scratch:
        for name, content in files.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        except Exception as error:  # whatever transformers makes of it
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise PackError(
                f"{label}: has no tokenizer that transformers reads ({said:.120})",
                "Text has to be cut into this model's tokens; give a model with a tokenizer.",
            ) from None
        yield tokenizer


def cut(text: Text, tokenizer: Any, label: str, context: int, most: int, seed: int = 0) -> Windows:
    """Cut a text into windows.

    Documents follow one another, each as the tokenizer begins and ends a text. Of more windows than
    are wanted, some are taken by the seed, in their order.

    Args:
        text: The documents.
        tokenizer: Of the model.
        label: What the user called the model.
        context: Tokens of a window.
        most: Windows at most.
        seed: Of the choice.

    Raises:
        PackError: The text is too short, or a conversation meets a model without chat template.
    """
    stream: list[int] = []
    for document in text.documents:
        if isinstance(document, str):
            stream += tokenizer(document, verbose=False)["input_ids"]
        elif tokenizer.chat_template is None:
            raise PackError(
                f"{text.name}: holds conversations, and {label} has no chat template",
                "Give plain text, or a model with a chat template.",
            )
        else:
            stream += tokenizer.apply_chat_template(document, tokenize=True)["input_ids"]
    count = len(stream) // context
    if count < _FEWEST:
        raise PackError(
            f"{text.name}: has {len(stream)} tokens, too few for {_FEWEST} windows of {context}",
            f"Give a longer text, or --context {max(8, len(stream) // 8)}",
        )
    chosen: Sequence[int] = range(count)
    if count > most:
        # A choice that is the same everywhere: windows in the order of their hashes.
        order = sorted(chosen, key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).digest())
        chosen = sorted(order[:most])
    return Windows([stream[n * context : (n + 1) * context] for n in chosen], text, seed)
