"""Weights that stay in the files of the model: a graph can state where in a file they lie.

Whoever runs a graph takes files beside it only, so each file of the model gets a second name there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporters.onnx.graph import Graph
from exporters.onnx.layout import Place
from exporters.onnx.rewrite import Rewritten
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.checkpoint.safetensors import SafetensorsCheckpoint
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.parts import Parts

__all__ = ["Links", "link_weights"]

_TYPES = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


@dataclass(frozen=True)
class Links:
    """What is linked.

    Attributes:
        places: Where initializers lie, by name.
        files: Files of the model by their name beside the graph.
    """

    places: Mapping[str, Place]
    files: Mapping[str, Path]


def link_weights(graph: Graph, made: Rewritten, parts: Parts, checkpoint: Checkpoint) -> Links:
    """Find the weights that a graph takes as the model's files have them.

    Args:
        graph: With its deferred weights.
        made: The same for the kind of file that is wanted.
        parts: Where parameters lie in the checkpoint.
        checkpoint: The model.

    Raises:
        PackError: There is none.
    """
    places: dict[str, Place] = {}
    files: dict[str, Path] = {}
    if isinstance(checkpoint, SafetensorsCheckpoint):
        for name, weight in graph.deferred.items():
            value = made.model.graph.initializers.get(name)
            if value is None or not isinstance(weight.source, str):
                continue
            found = parts.names.find(weight.source)
            if len(found) != 1 or found[0].expert is not None:
                continue
            spec = checkpoint.spec(found[0].tensor)
            wanted = _TYPES.get(value.dtype.name), tuple(int(size) for size in value.shape)
            if (spec.dtype.name, spec.shape) == wanted:
                path, offset, length = checkpoint.place_of(found[0].tensor)
                places[name] = Place(path.name, offset, length)
                files[path.name] = path
    if not places:
        raise PackError(
            f"{checkpoint.label}: none of its weights is stored as this graph wants it",
            "--link-weights is for models in safetensors, with the type that they are stored in: "
            "bf16, fp16 or fp32.",
        )
    return Links(places, files)
