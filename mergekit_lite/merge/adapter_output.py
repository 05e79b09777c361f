"""A new adapter as a result: whole or not at all, with its lock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.adapters.config import CONFIG_NAME
from mergekit_lite.adapters.write import WEIGHTS_NAME, NewAdapter
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.plan import Shard
from mergekit_lite.merge.writer import ArtifactWriter, OutputFile

__all__ = ["write_adapter"]


def write_adapter(
    adapter: NewAdapter,
    final: Path,
    kind: str,
    fields: Mapping[str, Any],
    sources: Sequence[Source],
    *,
    force: bool,
) -> list[OutputFile]:
    """Write an adapter's folder.

    Args:
        adapter: What to write.
        final: Folder that it will have.
        kind: What made it, for the lock.
        fields: How it was made, for the lock.
        sources: What it was made from; hashed here.
        force: Whether an existing result of pack is replaced.

    Returns:
        Every file, the lock included.

    Raises:
        PackError: The adapter is empty, the disk is full, or an input changed.
    """
    prefix, header, stored = adapter.file()
    shard = Shard(WEIGHTS_NAME, prefix, header)
    asked = hashlib.sha256(json.dumps(fields, sort_keys=True).encode() + prefix).hexdigest()
    writer = ArtifactWriter(final, [shard], f"{kind} {asked}", force)
    try:
        if WEIGHTS_NAME not in writer.done:
            for name, data in stored.items():
                writer.write(name, 0, data)
                writer.tensor_done(name, 0)
        weights = {source.reference: source.checkpoint.input_files() for source in sources}
        files = {CONFIG_NAME: to_json(adapter.config())}
        lock = lock_file(kind, fields, sources, weights, writer.outputs(files))
        return writer.publish({**files, LOCK_NAME: lock})
    finally:
        writer.close()
