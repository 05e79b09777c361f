"""Whatever a user may mean by a model, opened to be evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from exporters.gguf.evaluate import LlamaSubject
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.measure import LayerwiseSubject, Subject
from mergekit_lite.merge.model import WholeModel, open_whole
from mergekit_lite.merge.run import Progress

__all__ = ["open_subject", "tokenizing"]


@contextmanager
def open_subject(
    name: str, home: Path, dtype: str, device: str, progress: Progress
) -> Iterator[tuple[Subject, WholeModel | None]]:
    """Open a model.

    Args:
        name: A folder, a Hub id, base+adapter, a recipe, or a GGUF file.
        home: Folder that relative paths start from.
        dtype: What is computed in.
        device: torch's device.
        progress: Told how far it is.

    Yields:
        What gives its logits; and the model with its small files, None for a GGUF file.

    Raises:
        PackError: There is no such model, or it cannot be run.
    """
    path = home / name
    if path.suffix == ".gguf" and path.is_file():
        yield LlamaSubject(name, path), None
        return
    whole = open_whole(name, home)
    try:
        whole.observe_alone(progress)
        subject = LayerwiseSubject(name, whole.checkpoint, dtype, device)
        try:
            yield subject, whole
        finally:
            subject.close()
    finally:
        whole.close()


def tokenizing(
    models: Sequence[WholeModel | None], names: Sequence[str]
) -> tuple[Mapping[str, bytes], str]:
    """The small files of the first model that has a tokenizer, and what the user called it.

    Raises:
        PackError: None has one.
    """
    for model, name in zip(models, names, strict=True):
        if model is not None and any("token" in file for file in model.files):
            return model.files, name
    raise PackError(
        f"{', '.join(names)}: no tokenizer that cuts text into tokens",
        "Give the model that a GGUF file was made of as --reference.",
    )
