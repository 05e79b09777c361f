"""Opening whatever a user wants to look at, without fetching weights from the Hub."""

from __future__ import annotations

from pathlib import Path

from mergekit_lite.adapters.config import CONFIG_NAME
from mergekit_lite.adapters.locate import is_adapter, open_adapter, put_on
from mergekit_lite.checkpoint.far.address import is_far
from mergekit_lite.checkpoint.far.locate import open_far, open_far_hub
from mergekit_lite.checkpoint.hub import parse_reference as parse_hub_reference
from mergekit_lite.checkpoint.locate import Source, find_local, open_checkpoint
from mergekit_lite.checkpoint.onnx import OnnxCheckpoint, find_graph
from mergekit_lite.recipe.reference import parse_reference

__all__ = ["holds_adapter", "look_at"]


def look_at(reference: str, home: Path) -> Source:
    """Open a model, an adapter, or a base with adapters; of what lies elsewhere, headers only.

    Args:
        reference: As the user wrote it.
        home: Folder that relative paths start from; the current folder is tried next.

    Raises:
        PackError: There is nothing of that name, or it is broken.
    """
    if "+" not in reference or find_local(reference, home) is not None:
        return _one(reference, home)
    parsed = parse_reference(reference)
    parts: list[Source] = []
    try:
        for name in (parsed.base, *(adapter.name for adapter in parsed.adapters)):
            parts.append(_one(name, home))  # noqa: PERF401 (those opened must be closed)
        if not parsed.adapters:
            return parts[0]
        return put_on(reference, parts[0], parts[1:], parsed.adapters, home)
    except BaseException:
        for part in parts:
            part.checkpoint.close()
        raise


def _one(reference: str, home: Path) -> Source:
    """Open what is no base with adapters; a ``+`` belongs to its name."""
    local = find_local(reference, home)
    if local is not None:
        graph = find_graph(local)
        if graph is not None:
            return Source(reference, None, local, OnnxCheckpoint(graph, reference))
        adapter = is_adapter(reference, home)
        return (open_adapter if adapter else open_checkpoint)(reference, home)
    if is_far(reference):
        folder, commit, checkpoint = open_far(reference)
        return Source(reference, commit, folder, checkpoint)
    hub = parse_hub_reference(reference)
    if hub is None or reference.startswith((".", "/", "~")):
        return open_checkpoint(reference, home)  # says that nothing is there, and what is near
    folder, commit, checkpoint = open_far_hub(hub, reference)
    return Source(reference, commit, folder, checkpoint)


def holds_adapter(source: Source) -> bool:
    """Whether what was opened is an adapter alone."""
    folder = source.path
    return (
        not source.parts
        and (folder / CONFIG_NAME).is_file()
        and not (folder / "config.json").is_file()
    )
