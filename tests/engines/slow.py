"""Tasks that note who runs them and wait where a test says so; and the command with such tasks.

``python -m tests.engines.slow FOLDER merge …`` is ``pack merge …`` of that kind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_lite.engines import tasks


def slow_write(folder: Path) -> Callable[..., Any]:
    """`tasks.write` that leaves ``NAME.ID`` in a folder and waits while its ``held`` has NAME.

    It is defined in here, so that it is pickled as a whole: workers do not import tests.
    """
    really = tasks.write

    def write(asked: Any, result: int, name: str, statistic: Any, threads: int) -> Any:
        import json
        import os
        import time
        import uuid

        import ray

        node = ray.get_runtime_context().get_node_id()
        beside = folder / f"{uuid.uuid4().hex}.tmp"
        beside.write_text(json.dumps({"name": name, "pid": os.getpid(), "node": node}))
        beside.rename(folder / f"{name}.{beside.stem}.attempt")
        while name in (folder / "held").read_text().split():
            time.sleep(0.02)
        return really(asked, result, name, statistic, threads)

    return write


def fatal_do(folder: Path, layer: int) -> Callable[..., Any]:
    """`tasks.do` whose first worker is killed while it is in a layer; notes layers as they come.

    Each layer that is computed leaves ``LAYER.ID`` in a folder.
    """
    really = tasks.do

    def do(asked: Any, step: Any, statistic: Any, threads: int) -> Any:
        import os
        import signal
        import uuid

        from exporters.linears.store import LayerStore

        put = LayerStore.put

        def dying(self: Any, index: int, *rest: Any) -> None:
            (folder / f"{index}.{uuid.uuid4().hex}").touch()
            if index == layer and not (folder / "dead").exists():
                (folder / "dead").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            put(self, index, *rest)

        LayerStore.put = dying  # type: ignore[method-assign]
        try:
            return really(asked, step, statistic, threads)
        finally:
            LayerStore.put = put  # type: ignore[method-assign]

    return do


def attempts(folder: Path) -> list[dict[str, Any]]:
    """What tasks have noted so far."""
    return [json.loads(path.read_text()) for path in folder.glob("*.attempt")]


def hold(folder: Path, *names: str) -> None:
    """Let files of these names wait."""
    folder.mkdir(exist_ok=True)
    beside = folder / "held.new"
    beside.write_text("\n".join(names))
    beside.rename(folder / "held")


if __name__ == "__main__":
    from mergekit_lite.cli import main

    tasks.write = slow_write(Path(sys.argv.pop(1)))
    main()
