"""What the models of a merge changed in their base, by layer: data and a plot for the card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_lite.analyse.diff import compare_models
from mergekit_lite.analyse.plot import by_layer, layer_plot
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.errors import PackError
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import refuse_existing
from mergekit_lite.release.writer import write_result

__all__ = ["PLOT", "compare_inputs"]

PLOT = "deltas.svg"


def compare_inputs(
    models: Sequence[Source],
    sources: Sequence[Source],
    names: Sequence[str],
    folder: Path,
    threads: int,
    force: bool,
    progress: Progress,
) -> bool:
    """Compare the models of a merge, and write what was found.

    Args:
        models: The base first.
        sources: What they are made of, each once.
        names: Of the models.
        folder: Where the result goes.
        threads: Worker threads.
        force: Whether an existing result of pack is replaced.
        progress: Told how far it is.

    Returns:
        Whether there was something to compare: the models have layers of one shape.
    """
    refuse_existing(folder, force)
    base, *others = (model.checkpoint for model in models)
    try:
        found = compare_models(base, others, names, threads, progress)
    except PackError:  # no tensor in common
        return False
    layers = by_layer(found)
    if not layers:
        return False
    data = {
        "base": names[0],
        "models": list(names[1:]),
        "layers": [
            {"layer": la.index, "change": list(la.change), "conflict": la.conflict}
            for la in layers
        ],
    }  # fmt: skip
    files = {"deltas.json": to_json(data), PLOT: layer_plot(layers, names[1:]).encode()}
    write_result(folder, "compare", {"models": list(names)}, sources, files)
    return True
