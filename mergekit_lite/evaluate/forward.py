"""A model run on text one decoder layer at a time.

Only one layer's weights are in memory. For each layer every batch goes through the model's own
forward, in which the layers before stand aside and the one that is loaded gets the hidden states
that were kept: so masks, positions and whatever else a model hands to its layers are its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.parts import Parts
from mergekit_lite.merge.run import Progress

__all__ = ["ACTIVATIONS", "LayerwiseModel", "require_torch"]

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


class _Reached(Exception):
    """The loaded layer was run; what comes after it is not needed."""


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

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def hidden(
        self,
        batches: Sequence[Any],
        progress: Progress,
        around: Callable[[str, Any, Callable[[], None]], None] | None = None,
    ) -> _Kept:
        """Run all layers over all batches.

        Args:
            batches: Token ids, ``(sequences, tokens)`` int64.
            progress: Told how far it is.
            around: Called for each layer, with its path, the layer, and what runs all batches
                through it, which it must call once; for whoever looks at what goes in.

        Returns:
            The hidden states behind the last layer, for `logits`.

        Raises:
            PackError: A layer gives NaN or infinity.
        """
        kept = _Kept(self._torch, self._budget)
        sizes = [sum(p.numel() for p in layer.parameters()) * 4 for layer in self._layers]
        progress.begin("Layers", sum(sizes))
        with self._torch.inference_mode(), ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._parts.read, self.paths[0])
            with self._around():
                for index, path in enumerate(self.paths):
                    self._parts.fill(path, coming.result())
                    if index + 1 < len(self.paths):
                        coming = ahead.submit(self._parts.read, self.paths[index + 1])
                    try:
                        run = partial(self._all, batches, kept, index)
                        if around is None:
                            run()
                        else:
                            around(path, self._layers[index], run)
                    finally:
                        self._parts.empty(path)
                    progress.advance(sizes[index])
        return kept

    def logits(self, batches: Sequence[Any], kept: _Kept) -> Iterator[Any]:
        """What the model says of each batch: ``(sequences, tokens, vocabulary)`` float32."""
        with self._torch.inference_mode(), self._around():
            for number, batch in enumerate(batches):
                with self._aside(len(self.paths), kept.get(number)):
                    found = self.model(input_ids=batch.to(self._device), use_cache=False).logits
                yield found.float().cpu()

    @contextmanager
    def _around(self) -> Iterator[None]:
        """Fill what lies around the layers: embeddings, norms, head."""
        for path in self._outside:
            self._parts.fill(path, self._parts.read(path))
        try:
            yield
        finally:
            for path in self._outside:
                self._parts.empty(path)

    def _all(self, batches: Sequence[Any], kept: _Kept, index: int) -> None:
        """Run every batch through one layer."""
        for number, batch in enumerate(batches):
            found = self._through(batch, kept.get(number) if index else None, index)
            if not bool(self._torch.isfinite(found).all()):
                raise PackError(
                    f"{self._label}: layer {index} gives NaN or infinity",
                    "Its weights are broken, or too large for this type: try --dtype float32",
                )
            kept.put(number, found)

    def _through(self, batch: Any, before: Any, index: int) -> Any:
        """Hidden states behind a layer."""
        out: list[Any] = []
        with self._aside(index, before, out):
            try:
                self.model(input_ids=batch.to(self._device), use_cache=False)
            except _Reached:
                pass
            else:
                raise PackError(
                    f"{self._label}: its forward does not run '{self.paths[index]}' in its turn",
                    "Models of this kind cannot be run layer by layer.",
                )
        return out[0]

    @contextmanager
    def _aside(self, index: int, before: Any, out: list[Any] | None = None) -> Iterator[None]:
        """Let the layers before one stand aside, and stop behind it.

        Args:
            index: Of the layer that is run; the number of layers for what comes behind them.
            before: Hidden states that it gets; None for those of the embeddings.
            out: Takes the hidden states behind it.
        """
        device = self._device

        def stand(*args: Any, **keys: Any) -> Any:
            return self._wrapped(args[0] if args else keys["hidden_states"])

        def last(*args: Any, **keys: Any) -> Any:
            return self._wrapped(before.to(device))

        def run(forward: Callable[..., Any]) -> Callable[..., Any]:
            def running(*args: Any, **keys: Any) -> Any:
                if before is not None:
                    if args:
                        args = (before.to(device), *args[1:])
                    else:
                        keys["hidden_states"] = before.to(device)
                found = forward(*args, **keys)
                self._tuple = isinstance(found, tuple)
                assert out is not None  # noqa: S101 (a layer is run for what it gives)
                out.append(found[0] if self._tuple else found)
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
