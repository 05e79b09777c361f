"""A model run on text one decoder layer at a time.

Only one layer's weights are in memory. For each layer every batch goes through the model's own
forward, in which the layers before stand aside and the one that is loaded gets the hidden states
that were kept: so masks, positions and whatever else a model hands to its layers are its own.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

from mergekit_lite import collector
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.lockstep import Lockstep
from mergekit_lite.evaluate.parts import Parts
from mergekit_lite.merge.run import Progress

__all__ = [
    "ACTIVATIONS",
    "Around",
    "Enough",
    "LayerRun",
    "LayerwiseModel",
    "require_torch",
    "set_threads",
]

ACTIVATIONS = 2 << 30
"""Bytes of hidden states that are kept in memory; more goes to a file."""


def require_torch(what: str) -> None:
    """Refuse where torch and transformers are not installed.

    Raises:
        PackError: One of them is missing.
    """
    missing = next((name for name in ("torch", "transformers") if find_spec(name) is None), None)
    if missing is not None:  # not imported: that takes seconds
        raise PackError(
            f"{what} runs the model, and '{missing}' is not installed",
            "pip install 'pack-models[eval]'",
        )


def set_threads(count: int) -> None:
    """Let torch compute on so many threads; its sums depend on how many share them."""
    import torch

    torch.set_num_threads(count)
    collector.resume()


class _Reached(Exception):
    """The loaded layer was run; what comes after it is not needed."""


class Enough(Exception):
    """Raised inside a layer that is looked at: what comes after is not needed."""


class LayerRun:
    """Runs all batches through the layer that is loaded, and keeps what comes out.

    Attributes:
        tokens: In all batches.
        done: Whether that was done, here or by `stepwise`.
    """

    def __init__(
        self,
        keep: Callable[[], None],
        look: Callable[[int | None], Any],
        together: Callable[[Callable[[], Any]], AbstractContextManager[Lockstep]],
        tokens: int,
    ) -> None:
        self._keep = keep
        self._look = look
        self._together = together
        self.tokens = tokens
        self.done = False

    def __call__(self) -> None:
        """Run all batches and go on with what comes out; to be called once."""
        self._keep()
        self.done = True

    def sample(self) -> Any:
        """What comes out of the first batch: ``(sequences, tokens, hidden)``; nothing is kept."""
        return self._look(1)

    def look(self, batches: int | None = None) -> None:
        """Run batches for whoever watches, and keep nothing.

        Args:
            batches: How many of them; None for all. One ends early where `Enough` is raised in it.
        """
        self._look(batches)

    def stepwise(self, inside: Callable[[], Any]) -> AbstractContextManager[Lockstep]:
        """Run all batches at once, each up to where whoever watches pauses it.

        Args:
            inside: Gives the context in which each batch is run, in a thread of its own.

        Returns:
            A context with what leads them; the layer is run when all have ended, and what comes
            out is kept.
        """
        self.done = True
        return self._together(inside)


Around = Callable[[str, Any, LayerRun], None]
"""Called for each layer with its path, the layer, and what runs batches through it."""


class LayerwiseModel:
    """A model that is run layer by layer.

    Args:
        checkpoint: Its weights and its config.
        dtype: ``float32`` or ``bfloat16``, which it computes with.
        device: torch's device; one layer at a time is on it.
        budget: Bytes of hidden states that are kept in memory.

    Attributes:
        paths: Paths of the decoder layers, in order.

    Raises:
        PackError: transformers has no such model, or it has no stack of layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "float32",
        device: str = "cpu",
        budget: int = ACTIVATIONS,
    ) -> None:
        import torch

        collector.resume()
        self._label = checkpoint.label
        self._torch: Any = torch
        self._dtype = getattr(torch, dtype)
        self._device = device
        self._budget = budget
        self._parts = Parts(checkpoint, self._dtype, device)
        self.model: Any = self._parts.model
        self.paths = _stack(self.model, checkpoint.label)
        self._layers = [self.model.get_submodule(path) for path in self.paths]
        self._outside = _outside(self.model, self.paths)
        self._tuple = False
        self._embedded = False
        self._call = threading.local()

    @property
    def names(self) -> ModelNames:
        """Where its parameters lie in the checkpoint."""
        return self._parts.names

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def hidden(
        self,
        batches: Sequence[Any],
        progress: Progress,
        around: Around | None = None,
    ) -> _Kept:
        """Run all layers over all batches.

        Args:
            batches: Token ids, ``(sequences, tokens)`` int64.
            progress: Told how far it is.
            around: Called for each layer in the place of running it; it must call what it gets
                once. For whoever looks at what goes in, or changes the layer.

        Returns:
            The hidden states behind the last layer, for `logits`.

        Raises:
            PackError: A layer gives NaN or infinity.
        """
        kept = _Kept(self._torch, self._budget)
        sizes = [sum(p.numel() for p in layer.parameters()) * 4 for layer in self._layers]
        progress.begin("Layers", sum(sizes))
        with self._torch.inference_mode(), ThreadPoolExecutor(1) as ahead:
            coming: Future[dict[str, Any]] | None = None
            with self._around(head=False) as around_them:
                self._embed(batches, kept)
                self._forget_embeddings(around_them)
                for index, path in enumerate(self.paths):
                    values = self._parts.read(path) if coming is None else coming.result()
                    coming = None
                    self._parts.fill(path, values)
                    del values
                    # Whoever goes around a layer takes long, and wants the memory of the next one.
                    if around is None and index + 1 < len(self.paths):
                        coming = ahead.submit(self._parts.read, self.paths[index + 1])
                    try:
                        if around is None:
                            self._all(batches, kept, index)
                        else:
                            around(path, self._layers[index], self._run(batches, kept, index))
                    finally:
                        self._parts.empty(path)
                    progress.advance(sizes[index])
        return kept

    def logits(self, batches: Sequence[Any], kept: _Kept) -> Iterator[Any]:
        """What the model says of each batch: ``(sequences, tokens, vocabulary)`` float32."""
        with self._torch.inference_mode(), self._around(embedding=not self._takes_embedded()):
            for number, batch in enumerate(batches):
                before = kept.get(number)
                with self._aside(len(self.paths)):
                    self._call.before = before
                    if self._takes_embedded():
                        found = self.model(inputs_embeds=before.to(self._device), use_cache=False)
                    else:
                        found = self.model(input_ids=batch.to(self._device), use_cache=False)
                yield found.logits.float().cpu()

    @contextmanager
    def _around(self, head: bool = True, embedding: bool = True) -> Iterator[list[str]]:
        """Fill what lies around the layers: norms and, where wanted, the embedding and the head."""
        first, last = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        unwanted = [None if head else last, None if embedding else first]
        paths = [p for p in self._outside if self.model.get_submodule(p) not in unwanted]
        for path in paths:
            self._parts.fill(path, self._parts.read(path))
        try:
            yield paths
        finally:
            self._embedded = False
            for path in paths:
                self._parts.empty(path)

    def _forget_embeddings(self, paths: list[str]) -> None:
        """Later layers get hidden states; of large vocabularies the embedding is most of memory."""
        embedding = self.model.get_input_embeddings()
        found = next((p for p in paths if self.model.get_submodule(p) is embedding), None)
        if found is not None and self._takes_embedded():
            self._parts.empty(found)
            paths.remove(found)
            self._embedded = True

    def _takes_embedded(self) -> bool:
        return "inputs_embeds" in signature(self.model.forward).parameters

    def _run(self, batches: Sequence[Any], kept: _Kept, index: int) -> LayerRun:
        """What runs batches through one layer, for whoever goes around it."""
        return LayerRun(
            partial(self._all, batches, kept, index),
            partial(self._look, batches, kept, index),
            partial(self._together, batches, kept, index),
            sum(batch.numel() for batch in batches),
        )

    def _all(self, batches: Sequence[Any], kept: _Kept, index: int) -> None:
        """Run every batch through one layer."""
        with self._aside(index):
            for number, batch in enumerate(batches):
                self._one(batch, kept, number, index)

    def _look(
        self, batches: Sequence[Any], kept: _Kept, index: int, most: int | None = None
    ) -> Any:
        """Run batches through one layer; what comes out of the last is returned, none is kept."""
        found = None
        with self._aside(index):
            for number, batch in enumerate(batches[:most]):
                with suppress(Enough):
                    found = self._through(batch, kept.get(number), index)
        return found

    @contextmanager
    def _together(
        self, batches: Sequence[Any], kept: _Kept, index: int, inside: Callable[[], Any]
    ) -> Iterator[Lockstep]:
        """Run every batch in a thread of its own."""

        def work(number: int) -> None:
            with self._torch.inference_mode(), inside():
                self._one(batches[number], kept, number, index)

        with self._aside(index):
            lockstep = Lockstep([partial(work, number) for number in range(len(batches))])
            try:
                yield lockstep
            finally:
                lockstep.close()

    def _embed(self, batches: Sequence[Any], kept: _Kept) -> None:
        """Keep what the first layer gets."""

        def stop(*args: Any, **keys: Any) -> Any:
            self._call.out = args[0] if args else keys["hidden_states"]
            raise _Reached

        first = self._layers[0]
        first.forward = stop
        try:
            for number, batch in enumerate(batches):
                with suppress(_Reached):
                    self.model(input_ids=batch.to(self._device), use_cache=False)
                kept.put(number, self._call.out)
        finally:
            del first.forward

    def _one(self, batch: Any, kept: _Kept, number: int, index: int) -> None:
        """Run a batch through one layer, and keep what comes out."""
        found = self._through(batch, kept.get(number), index)
        if not bool(self._torch.isfinite(found).all()):
            raise PackError(
                f"{self._label}: layer {index} gives NaN or infinity",
                "Its weights are broken, or too large for this type: try --dtype float32",
            )
        kept.put(number, found)

    def _through(self, batch: Any, before: Any, index: int) -> Any:
        """Hidden states behind a layer that the others stand aside of."""
        self._call.before = before
        self._call.out = None
        try:
            if self._embedded:
                self.model(inputs_embeds=before.to(self._device), use_cache=False)
            else:
                self.model(input_ids=batch.to(self._device), use_cache=False)
        except _Reached:
            return self._call.out
        finally:
            self._call.before = None
        raise PackError(
            f"{self._label}: its forward does not run '{self.paths[index]}' in its turn",
            "Models of this kind cannot be run layer by layer.",
        )

    @contextmanager
    def _aside(self, index: int) -> Iterator[None]:
        """Let the layers before one stand aside, and stop behind it.

        What it gets, and what comes out, belongs to the thread that calls the model.

        Args:
            index: Of the layer that is run; the number of layers for what comes behind them.
        """
        device, call = self._device, self._call

        def stand(*args: Any, **keys: Any) -> Any:
            return self._wrapped(args[0] if args else keys["hidden_states"])

        def last(*args: Any, **keys: Any) -> Any:
            return self._wrapped(call.before.to(device))

        def run(forward: Callable[..., Any]) -> Callable[..., Any]:
            def running(*args: Any, **keys: Any) -> Any:
                if args:
                    args = (call.before.to(device), *args[1:])
                else:
                    keys["hidden_states"] = call.before.to(device)
                found = forward(*args, **keys)
                self._tuple = isinstance(found, tuple)
                call.out = found[0] if self._tuple else found
                raise _Reached

            return running

        for at, layer in enumerate(self._layers):
            if at == index:
                layer.forward = run(type(layer).forward.__get__(layer))
            elif at == index - 1 and index == len(self._layers):
                layer.forward = last
            else:
                layer.forward = stand
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _wrapped(self, hidden: Any) -> Any:
        return (hidden,) if self._tuple else hidden


class _Kept:
    """Hidden states of every batch, in memory up to a budget, then in a file."""

    def __init__(self, torch: Any, budget: int) -> None:
        self._torch = torch
        self._budget = budget
        self._held: dict[int, Any] = {}
        self._mapped: dict[int, Any] = {}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self, number: int) -> Any:
        """Of one batch."""
        return self._held[number] if number in self._held else self._mapped[number]

    def put(self, number: int, states: Any) -> None:
        """Keep those of one batch in the place of the earlier ones."""
        states = states.detach().cpu()
        size = states.numel() * states.element_size()
        if number in self._mapped:
            self._mapped[number].copy_(states)
        elif number in self._held or self._bytes + size <= self._budget:
            self._bytes += 0 if number in self._held else size
            self._held[number] = states
        else:
            self._mapped[number] = self._file(number, states)

    def _file(self, number: int, states: Any) -> Any:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="pack-")
        mapped = self._torch.from_file(
            f"{self._folder.name}/{number}", shared=True, size=states.numel(), dtype=states.dtype
        )
        mapped = mapped.reshape(states.shape)
        mapped.copy_(states)
        return mapped

    def close(self) -> None:
        """Let go of all."""
        self._held.clear()
        self._mapped.clear()
        if self._folder is not None:
            self._folder.cleanup()


def _stack(model: Any, label: str) -> list[str]:
    """Paths of the layers: the list of modules that holds most of the model's parameters."""
    import torch

    found: list[tuple[int, str, int]] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            size = sum(p.numel() for p in module.parameters())
            found.append((size, path, len(module)))
    if not found:
        raise PackError(
            f"{label}: a {type(model).__name__} has no stack of layers",
            "Models of this kind cannot be run layer by layer.",
        )
    largest = max(size for size, _, _ in found)
    # Of nested lists that hold the same, the outer one.
    _, path, count = min((entry for entry in found if entry[0] == largest), key=lambda e: len(e[1]))
    return [f"{path}.{index}" for index in range(count)]


def _outside(model: Any, layers: Sequence[str]) -> list[str]:
    """Paths of the modules with parameters of their own that are no layer's."""
    stack = layers[0].rpartition(".")[0] + "."
    found: list[str] = []
    for path, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]  # noqa: SLF001
        if own and not path.startswith(stack):
            if path == "" or any(path.startswith(f"{outer}.") for outer in found):
                continue
            found.append(path)
    return found
