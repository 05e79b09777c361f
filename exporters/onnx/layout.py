"""Where the weights of a graph lie: files beside it that are written as a stream.

A model of ONNX is one protobuf message, which cannot be larger than 2 GB; larger initializers are
stated by file, offset and length ("external data"). The names are those that transformers.js looks
for: ``model.onnx_data``, then ``model.onnx_data_1`` and so on, none larger than a browser takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir

from exporters.onnx.rewrite import Rewritten
from mergekit_lite.checkpoint.header import Entry, Header
from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.merge.plan import Shard

__all__ = ["CHUNK", "INLINE", "LaidOut", "Place", "lay_out_graph"]

CHUNK = 2_000_000_000
"""Bytes of a file of weights that holds more than one; browsers take no buffer over 2 GiB."""
INLINE = 1024
"""Bytes below which constants stay in the graph."""
_PAGE, _WORD = 4096, 64
_LARGE = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where an initializer lies.

    Attributes:
        file: Name of the file, without its folder.
        offset: Its first byte there.
        length: In bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class LaidOut:
    """A graph with its files.

    Attributes:
        graph: The protobuf message of the ``.onnx`` file.
        shards: Files of weights, with an entry for each initializer.
        constants: Large initializers whose values are there already, by name.
        chunks: Number of files of weights.
    """

    graph: bytes
    shards: Sequence[Shard]
    constants: Mapping[str, Array]
    chunks: int


def lay_out_graph(made: Rewritten, folder: str, stem: str, linked: Mapping[str, Place]) -> LaidOut:
    """Plan the files of a graph.

    Args:
        made: The graph, and what makes its initializers.
        folder: Of the files, in the result.
        stem: Name of the file without ``.onnx``.
        linked: Where initializers lie that are in files of the model already.
    """
    graph = made.model.graph
    names = [name for piece in made.pieces for name in piece.names if name not in linked]
    constants = {}
    for name, value in graph.initializers.items():
        if name in linked or name in names:
            continue
        array = np.asarray(value.const_value.numpy(), order="C")
        if array.nbytes >= INLINE:
            constants[name] = array
            names.append(name)
        else:
            value.const_value = onnx_ir.tensor(array, name=name, dtype=value.dtype)
    places = _places(graph, names, stem)
    places |= linked
    for name, place in places.items():
        value = graph.initializers[name]
        value.const_value = onnx_ir.ExternalTensor(
            place.file, place.offset, place.length, value.dtype, shape=value.shape, name=name
        )
    shards: dict[str, dict[str, Entry]] = {}
    for name, after in zip(names, [*names[1:], None], strict=bool(names)):
        place, value = places[name], graph.initializers[name]
        shape = tuple(int(size) for size in value.shape)
        follows = after is not None and places[after].file == place.file
        # What lies between two of them belongs to the first, and is zero.
        end = places[after].offset if after and follows else place.offset + place.length
        shards.setdefault(place.file, {})[name] = Entry(DTYPES["U8"], shape, place.offset, end)
    message = onnx_ir.to_proto(made.model).SerializeToString(deterministic=True)
    return LaidOut(
        message,
        [Shard(f"{folder}/{file}", b"", Header(held, {}, 0)) for file, held in shards.items()],
        constants,
        len(shards),
    )


def _places(graph: Any, names: Sequence[str], stem: str) -> dict[str, Place]:
    found: dict[str, Place] = {}
    number, at = 0, 0
    for name in names:
        value = graph.initializers[name]
        length = prod(int(size) for size in value.shape) * value.dtype.itemsize
        length = int(length)
        step = _PAGE if length >= _LARGE else _WORD
        start = at + -at % step
        if at and start + length > CHUNK:
            number, start = number + 1, 0
        file = f"{stem}.onnx_data" + (f"_{number}" if number else "")
        found[name] = Place(file, start, length)
        at = start + length
    return found
