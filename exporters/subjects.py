"""Whatever a user may mean by a model, opened to be evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from exporters.gguf.evaluate import LlamaSubject
from mergekit_lite.checkpoint.onnx import find_graph
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.measure import LayerwiseSubject, Subject
from mergekit_lite.merge.model import open_whole, small_files_of
from mergekit_lite.merge.run import Progress

__all__ = ["open_subject", "tokenizing"]


@contextmanager
def open_subject(
    name: str, home: Path, dtype: str, device: str, progress: Progress
) -> Iterator[tuple[Subject, Mapping[str, bytes]]]:
    """Open a model.

    Args:
        name: A folder, a Hub id, base+adapter, a recipe, a GGUF file, or a graph of ONNX.
        home: Folder that relative paths start from.
        dtype: What is computed in.
        device: torch's device.
        progress: Told how far it is.

    Yields:
        What gives its logits; and its small files, none for a GGUF file.

    Raises:
        PackError: There is no such model, or it cannot be run.
    """
    path = home / name
    if path.suffix == ".gguf" and path.is_file():
        yield LlamaSubject(name, path), {}
        return
    graph = find_graph(path)
    if graph is not None:
        from exporters.onnx.session import require_onnxruntime

        require_onnxruntime(name)
        from exporters.onnx.evaluate import OnnxSubject

        yield OnnxSubject(name, graph), _beside(graph)
        return
    whole = open_whole(name, home)
    try:
        whole.observe_alone(progress)
        subject = LayerwiseSubject(name, whole.checkpoint, dtype, device)
        try:
            yield subject, whole.files
        finally:
            subject.close()
    finally:
        whole.close()


def _beside(graph: Path) -> Mapping[str, bytes]:
    """Small files of a graph: beside it, or beside the folder ``onnx`` that it is in."""
    found = small_files_of(graph.parent)
    return found if "config.json" in found else small_files_of(graph.parent.parent)


def tokenizing(
    files: Sequence[Mapping[str, bytes]], names: Sequence[str]
) -> tuple[Mapping[str, bytes], str]:
    """The small files of the first model that has a tokenizer, and what the user called it.

    Raises:
        PackError: None has one.
    """
    for beside, name in zip(files, names, strict=True):
        if any("token" in file for file in beside):
            return beside, name
    raise PackError(
        f"{', '.join(names)}: no tokenizer that cuts text into tokens",
        "Give the model that a GGUF file was made of as --reference.",
    )
