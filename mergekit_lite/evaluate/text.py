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
from mergekit_lite.checkpoint.hub import dataset_file
from mergekit_lite.checkpoint.locate import find_local
from mergekit_lite.errors import PackError

__all__ = ["Text", "Windows", "cut", "find_text", "read_text", "tokenizer_of"]

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
        asked: How many were asked for, at most; 0 if that is not known.
    """

    ids: Sequence[Sequence[int]]
    text: Text
    seed: int
    asked: int = 0

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
    """Read text, or JSON lines or Parquet with ``text`` or ``messages``; None for the built-in one.

    Raises:
        PackError: It is not there, no UTF-8, or holds nothing.
    """
    path = path or Path(__file__).with_name("default.txt")
    try:
        if path.stat().st_size > _LARGEST:
            raise PackError(f"{path}: has more than {_LARGEST >> 20} MB", "Give a part of it.")
        raw = path.read_bytes()
        if path.suffix == ".parquet":
            return Text(path.name, hashlib.sha256(raw).hexdigest(), _parquet(path))
        content = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(
            f"{path}: cannot be read as text ({error})", "Give text in UTF-8."
        ) from None
    digest = hashlib.sha256(raw).hexdigest()
    documents: list[str | list[dict[str, str]]] = [content]
    if path.suffix in (".jsonl", ".ndjson"):
        lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        documents = [_document(path, number, line) for number, line in lines]
    documents = [document for document in documents if document]
    if not documents or all(isinstance(d, str) and not d.strip() for d in documents):
        raise PackError(f"{path}: holds no text", "Give a file with text.")
    return Text(path.name, digest, documents)


def find_text(name: str, home: Path) -> Path | None:
    """The file that a text's name means: on this disk, or of a data set on the Hub.

    Args:
        name: A path, or ``hf://datasets/ORG/NAME[@REVISION]/PATH``.
        home: Folder that relative paths start from.

    Returns:
        None where there is none of that name.

    Raises:
        PackError: A data set or its file cannot be had.
    """
    path = find_local(name, home)
    if path is not None and path.is_file():
        return path
    return dataset_file(name)


def _parquet(path: Path) -> list[str | list[dict[str, str]]]:
    """Rows of a table with a column ``text`` or ``messages``."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise PackError(
            f"{path}: is Parquet, and 'pyarrow' is not installed",
            "pip install 'pack-models[datasets]', or give text or JSON lines.",
        ) from None
    try:
        names = parquet.read_schema(path).names
        column = next((n for n in ("text", "messages") if n in names), None)
        if column is None:
            raise PackError(
                f"{path}: has neither a column 'text' nor 'messages' ({', '.join(names):.100})",
                "Give a table with one of them.",
            )
        rows = parquet.read_table(path, columns=[column]).column(0).to_pylist()
    except (OSError, ValueError) as error:
        raise PackError(f"{path}: cannot be read as Parquet ({error!s:.100})") from None
    return [
        _document(path, number, json.dumps({column: row})) for number, row in enumerate(rows, 1)
    ]


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
    return Windows([stream[n * context : (n + 1) * context] for n in chosen], text, seed, most)
