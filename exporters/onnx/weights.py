"""The weights of a graph on their way into its files, and by the way into onnxruntime.

Every weight is read from the model once: what is written is lent to whoever runs the graph beside
the model, a stage at a time, so that nothing is read back from the disk for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from exporters.onnx.deferred import Read
from exporters.onnx.graph import Graph
from exporters.onnx.layout import LaidOut
from exporters.onnx.pieces import Piece
from exporters.onnx.rewrite import Rewritten
from mergekit_lite.dtypes import Array
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import ArtifactWriter

__all__ = ["ENDS", "WeightWriter"]

ENDS = 64
"""Bytes at the start and the end of a weight that are looked for in the file."""


class WeightWriter:
    """Makes the initializers of a graph and puts them into their files, in the files' order.

    Args:
        made: The graph, and what makes its initializers.
        laid: Its files.
        read: Gives the model's parameters.
        writer: Of the result.
        threads: That weights are made in.
        progress: Told how far it is.

    Attributes:
        ends: First and last bytes of what was lent as it is written, by name.
    """

    def __init__(
        self,
        made: Rewritten,
        laid: LaidOut,
        read: Read,
        writer: ArtifactWriter,
        threads: int,
        progress: Progress,
    ) -> None:
        self._pieces = made.pieces
        self._laid = laid
        self._read = read
        self._writer = writer
        self._progress = progress
        self._spans = {n: e for shard in laid.shards for n, e in shard.header.entries.items()}
        self._todo = frozenset(
            name for shard in laid.shards if shard.name not in writer.done
            for name in shard.header.entries
        )  # fmt: skip
        self.ends: dict[str, tuple[bytes, bytes]] = {}
        self._next = 0
        self._pool = ThreadPoolExecutor(threads)
        wanted = [piece for piece in made.pieces if self._todo & set(piece.names)]
        progress.begin("Write", sum(piece.elements for piece in wanted))

    def finish(self) -> None:
        """Write all that is not written yet."""
        waiting = [self._pool.submit(self._make, piece, self._read) for piece in self._until(None)]
        for done in waiting:
            done.result()
        self._pool.shutdown()
        for name, array in self._laid.constants.items():
            self._put(name, [array])

    def abort(self) -> None:
        """Give up, from the thread that made this."""
        self._writer.abort()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def written(self, names: Sequence[str]) -> dict[str, Array]:
        """Initializers of a graph of floats, which are written on the way.

        Args:
            names: Of them; each is a weight of its own, or a constant.
        """
        wholes = {piece.names[0]: piece.whole for piece in self._pieces if piece.whole}

        def give(name: str, mine: Sequence[Piece]) -> Array:
            if name in self._laid.constants:
                return self._laid.constants[name]
            made = wholes[name](self._read)
            raw = made.reshape(-1).view(np.uint8)
            self.ends[name] = raw[:ENDS].tobytes(), raw[-ENDS:].tobytes()
            for piece in mine:
                self._done(piece, [[made]])
            return made

        return self._serve(names, {piece.names[0]: [piece] for piece in self._pieces}, give)

    def unrounded(
        self, graph: Graph, half: bool, read: Read | None
    ) -> Callable[[Sequence[str]], dict[str, Array]]:
        """What gives weights of the graph before it was rewritten; codes are written on the way.

        Args:
            graph: That graph.
            half: Whether its floats are float16.
            read: Gives the parameters that it is run with; None for those that are rounded.
        """
        pieces: dict[str, list[Piece]] = {}
        for piece in self._pieces:
            pieces.setdefault(piece.weight, []).append(piece)

        def give(name: str, mine: Sequence[Piece]) -> Array:
            once = _Once(self._read)
            for piece in mine:
                self._make(piece, once)
            values: Array = graph.deferred[name].read(read or once).contiguous().numpy()
            kind = np.float16 if half else np.float32
            return values.astype(kind, copy=False) if values.dtype.kind == "f" else values

        return lambda names: self._serve(names, pieces, give)

    def _serve(
        self,
        names: Sequence[str],
        pieces: Mapping[str, Sequence[Piece]],
        give: Callable[[str, Sequence[Piece]], Array],
    ) -> dict[str, Array]:
        """Give weights, and write the pieces that stand for them and those before them."""
        place = {id(piece): at for at, piece in enumerate(self._pieces)}
        last = {n: max((place[id(p)] for p in pieces.get(n, ())), default=-1) for n in names}
        waiting: dict[str, Future[Array]] = {}
        others = []
        for name in sorted(names, key=lambda name: last[name]):
            mine = {id(piece) for piece in pieces.get(name, ())}
            coming = self._until(last[name])
            # Files are written from their start on, so what is left behind comes first.
            others += [
                self._pool.submit(self._make, piece, self._read)
                for piece in coming if id(piece) not in mine
            ]  # fmt: skip
            waiting[name] = self._pool.submit(give, name, [p for p in coming if id(p) in mine])
        for done in others:
            done.result()
        return {name: done.result() for name, done in waiting.items()}

    def _until(self, last: int | None) -> Sequence[Piece]:
        """Pieces that nobody took yet, up to one of them."""
        end = len(self._pieces) if last is None else last + 1
        found = self._pieces[self._next : end]
        self._next = max(self._next, end)
        return found

    def _make(self, piece: Piece, read: Read) -> None:
        if self._todo & set(piece.names):
            self._done(piece, piece.make(read))

    def _done(self, piece: Piece, content: Sequence[Iterable[Array]]) -> None:
        if not self._todo & set(piece.names):
            return
        for name, arrays in zip(piece.names, content, strict=True):
            self._put(name, arrays)
        self._progress.advance(piece.elements)

    def _put(self, name: str, parts: Iterable[Array]) -> None:
        if name not in self._todo:
            return
        at = 0
        for part in parts:
            raw = part.reshape(-1).view(np.uint8)
            self._writer.write(name, at, raw)
            at += raw.size
        rest = self._spans[name].end - self._spans[name].start - at
        if rest:
            self._writer.write(name, at, np.zeros(rest, np.uint8))
        self._writer.tensor_done(name, 0)


class _Once:
    """Reads each parameter once; for one thread."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._held: dict[str, Any] = {}

    def __call__(self, path: str) -> Any:
        if path not in self._held:
            self._held[path] = self._read(path)
        return self._held[path]
