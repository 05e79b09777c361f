"""Adapters of one base made into one adapter, module by module, without the whole model.

A sum of low-rank changes is low-rank: its factors are those of the adapters, one beside the other.
That is exact, and the rank adds up; to have less, the product is factored anew. Methods that look
at single elements (TIES, DARE) get the changes of one module as full matrices and their result is
factored. All is computed in float64 until the factors are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_lite.adapters.config import AdapterConfig, LoraSettings
from mergekit_lite.adapters.contents import LoraContents, LoraModule, sort_tensors
from mergekit_lite.adapters.factor import Factored, Target, factor_matrix, factor_product
from mergekit_lite.adapters.lora import Part
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["Combination", "Combined", "LoraSource", "Mix"]


@dataclass(frozen=True)
class LoraSource:
    """One adapter that is combined.

    Attributes:
        config: What it says of itself.
        tensors: Its tensors.
        settings: What changes its arithmetic.
        contents: Its tensors by what they are.
        modules: Adapted modules by path.
    """

    config: AdapterConfig
    tensors: Checkpoint
    settings: LoraSettings
    contents: LoraContents
    modules: Mapping[str, LoraModule]

    @classmethod
    def open(cls, config: AdapterConfig, tensors: Checkpoint) -> LoraSource:
        """Sort its tensors, and check that it is of a kind that can be combined.

        Raises:
            PackError: It is no LoRA, or has parts that a combined adapter cannot carry.
        """
        if config.kind != "LORA":
            raise PackError(
                f"{config.label}: is of type {config.kind}; only LoRA adapters can become one "
                "adapter",
                "Merge it into its base instead, and extract an adapter: pack extract",
            )
        settings = LoraSettings.of(config)
        contents = sort_tensors(tensors)
        parts = {part for module in contents.modules for part in module.parts}
        cannot = [
            what
            for what, there in {
                "tensors that belong to no known part": bool(contents.leftovers),
                "trained rows of embeddings": bool(contents.rows),
                "biases of its factors": "lora_B.bias" in parts,
                "adapted parameters (experts)": bool(settings.parameters),
                "replicated layers": bool(settings.replication),
                "a change that holds for tied embeddings (ensure_weight_tying)": settings.ties
                and any(module.embedding for module in contents.modules),
                f"an initialisation that changed the base ({settings.initial})": settings.initial
                in ("pissa", "olora", "corda", "loftq", "lora_ga"),
            }.items()
            if there
        ]
        if cannot:
            raise PackError(
                f"{config.label}: has {' and '.join(cannot)}, which one adapter cannot carry",
                "Merge the adapters into the base instead: leave out 'output: adapter'.",
            )
        modules = {module.path: module for module in contents.modules}
        return cls(config, tensors, settings, contents, modules)

    def factors(self, path: str) -> tuple[Array, Array, float]:
        """A, ``(rank, in)``, and B, ``(out, rank)``, in float64, and the scale of their product."""
        module = self.modules[path]
        keys = module.factors
        if not set(keys) <= module.parts.keys():
            raise PackError(
                f"{self.config.label}: '{path}' lacks a factor",
                "The file is not whole; download or save the adapter again.",
            )
        a, b = (self.read(module.parts[key]) for key in keys)
        rank = self.settings.rank_of(path)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise PackError(
                f"{self.config.label}: the factors of '{path}' are {list(a.shape)} and "
                f"{list(b.shape)}; expected two matrices of rank {rank}",
                "Adapters of convolutions cannot be combined; else the file is broken.",
            )
        return a, b, self.settings.scale_of(path)

    def magnitude(self, path: str) -> Array | None:
        """The trained lengths of DoRA, ``(out,)`` in float64; None without."""
        name = self.modules[path].parts.get("lora_magnitude_vector")
        return None if name is None else self.read(name)

    def read(self, name: str) -> Array:
        """One of its tensors in float64.

        Raises:
            PackError: An element is NaN or infinite.
        """
        values = read_float(self.tensors, name)
        if not np.isfinite(values).all():
            raise PackError(
                f"{self.config.label}: '{name}' holds NaN or infinity",
                "The adapter is broken; train or download it again.",
            )
        return values.astype(np.float64)


@dataclass(frozen=True)
class Mix:
    """How the changes of one tensor are combined.

    Attributes:
        coefficients: What each adapter's change is multiplied by, where the result is their sum;
            None where it is computed element by element.
        combine: From the changes, ``(out, in)`` each, to their combination.
    """

    coefficients: Sequence[float] | None
    combine: Any


@dataclass(frozen=True)
class Combined:
    """The combination of one module.

    Attributes:
        path: Of the module.
        embedding: Whether it is an embedding.
        factored: The factors.
        exact: Whether they are the sum itself, nothing left out.
    """

    path: str
    embedding: bool
    factored: Factored
    exact: bool


class Combination:
    """The combination of several adapters; see the module's text.

    Attributes:
        paths: Modules that get factors.
        whole: Parameters that are carried whole: those that any adapter carries so, whatever the
            others have for them.

    Raises:
        PackError: The adapters do not fit each other or the base, or the base is needed.
    """

    def __init__(self, sources: Sequence[LoraSource], base: Checkpoint | None) -> None:
        self._sources = sources
        self._base = base
        self._names = None if base is None else ModelNames(base)
        self.whole = sorted({name for source in sources for name in source.contents.whole})
        paths = {path for source in sources for path in source.modules}
        self.paths = sorted(path for path in paths if f"{path}.weight" not in self.whole)
        needs = [s.config.label for s in sources if s.settings.dora or s.contents.whole]
        if needs and base is None:
            raise PackError(
                f"{needs[0]}: what it changes depends on the base (DoRA, or tensors saved whole)",
                "Give the base: base_model: …",
            )
        self._check_shapes(paths)
        for source in sources:
            self._check_copies(source)

    def _check_copies(self, source: LoraSource) -> None:
        """Compare weights of the base that an adapter carries, where the base is given."""
        if self._base is None or self._names is None:
            return
        for parameter, name in source.contents.copies.items():
            places = self._names.find(parameter)
            same = len(places) == 1 and np.array_equal(
                read_float(source.tensors, name), read_float(self._base, places[0].tensor)
            )
            if not same:
                raise PackError(
                    f"{source.config.label}: carries a '{parameter}' that is not the base's",
                    "It was trained on another base, or on resized embeddings; merge it into that "
                    "base.",
                )

    def _check_shapes(self, paths: Iterable[str]) -> None:
        for path in sorted(paths):
            shapes: dict[tuple[int, int], str] = {}
            for source in self._sources:
                module = source.modules.get(path)
                if module is None or not set(module.factors) <= module.parts.keys():
                    continue
                a, b = (source.tensors.spec(module.parts[key]).shape for key in module.factors)
                shapes.setdefault((b[0], a[-1]), source.config.label)
            if len(shapes) > 1:
                said = ", ".join(f"{list(shape)} in {label}" for shape, label in shapes.items())
                raise PackError(
                    f"'{path}' differs in shape: {said}",
                    "The adapters are of bases with different vocabularies or sizes.",
                )

    def module(self, path: str, mix: Mix, target: Target | None) -> Combined:
        """Combine the changes of one module.

        Args:
            path: Of the module.
            mix: How.
            target: What to keep; None for the exact sum.

        Raises:
            PackError: The exact result was asked for and is no sum of factors.
        """
        having = [source for source in self._sources if path in source.modules]
        embedding = having[0].modules[path].embedding
        plain = not any(source.settings.dora for source in having)
        if mix.coefficients is not None and plain:
            b, a = self._stacked(path, mix.coefficients)
            if target is None:
                kept = Factored(b.astype(np.float32), a.astype(np.float32), 1.0)
                return Combined(path, embedding, kept, exact=True)
            return Combined(path, embedding, factor_product(b, a, target), exact=False)
        changes = [self._change(source, path) for source in self._sources]
        shape = next(change.shape for change in changes if change is not None)
        total = mix.combine([np.zeros(shape) if c is None else c for c in changes])
        if target is not None:
            return Combined(path, embedding, factor_matrix(total, target), exact=False)
        return Combined(path, embedding, _as_factors(total), exact=True)

    def _stacked(self, path: str, coefficients: Sequence[float]) -> tuple[Array, Array]:
        """The factors of a weighted sum: all B side by side, all A one below the other."""
        every_a, every_b = [], []
        for source, coefficient in zip(self._sources, coefficients, strict=True):
            if path in source.modules and coefficient != 0.0:
                a, b, scale = source.factors(path)
                every_a.append(a)
                every_b.append(b * (coefficient * scale))
        if not every_a:
            a, b, _ = next(s for s in self._sources if path in s.modules).factors(path)
            return b[:, :1] * 0.0, a[:1]
        return np.concatenate(every_b, axis=1), np.concatenate(every_a)

    def _change(self, source: LoraSource, path: str) -> Array | None:
        """What an adapter adds to a module's weight, ``(out, in)`` in float64; None for nothing."""
        if path not in source.modules:
            return None
        a, b, scale = source.factors(path)
        change: Array = scale * (b @ a)
        magnitude = source.magnitude(path)
        if magnitude is None:
            return change
        weight = self._weight(path, source.modules[path].embedding, change.shape)
        merged = weight + change
        lengths = np.sqrt(np.einsum("ij,ij->i", merged, merged))
        merged *= (magnitude / lengths)[:, None]
        merged -= weight
        return merged

    def _weight(self, path: str, embedding: bool, shape: tuple[int, ...]) -> Array:
        """The base's weight as ``(out, in)``, in float64."""
        assert self._names is not None and self._base is not None  # noqa: S101, PT018
        places = self._places(f"{path}.weight")
        if len(places) != 1 or places[0].expert is not None:
            raise PackError(
                f"the base has no weight for '{path}'",
                "Check that this is the base that the adapters were trained on.",
            )
        stored = self._base.spec(places[0].tensor).shape
        if stored not in (shape, shape[::-1]):
            raise PackError(
                f"the base's '{places[0].tensor}' is {list(stored)}, while the adapters change a "
                f"weight of {list(shape)}",
                "Check that this is the base that the adapters were trained on.",
            )
        weight = read_float(self._base, places[0].tensor).astype(np.float64)
        turned = embedding or stored != shape
        return np.ascontiguousarray(weight.T) if turned else weight

    def tensor(self, parameter: str, mix: Mix) -> Array:
        """Combine what adapters carry whole: the base's tensor and the combined changes of it."""
        assert self._names is not None and self._base is not None  # noqa: S101, PT018
        places = self._places(parameter)
        if len(places) != 1 or places[0].expert is not None:
            raise PackError(
                f"'{parameter}' is carried whole, while the base has no such tensor",
                "It cannot be combined; merge the adapters into the base one by one.",
            )
        origin = read_float(self._base, places[0].tensor).astype(np.float64)
        changes = [self._change_of(parameter, origin, source) for source in self._sources]
        flat = [change.reshape(origin.shape[0], -1) for change in changes]
        combined: Array = origin + np.asarray(mix.combine(flat)).reshape(origin.shape)
        return combined.astype(np.float32)

    def _change_of(self, parameter: str, origin: Array, source: LoraSource) -> Array:
        """What an adapter adds to a parameter that the result carries whole; float64."""
        name = source.contents.whole.get(parameter)
        if name is not None:
            saved = source.read(name)
            if saved.shape != origin.shape:
                raise PackError(
                    f"{source.config.label}: '{parameter}' is {list(saved.shape)}, in the base "
                    f"{list(origin.shape)}",
                    "The adapter was trained on another vocabulary.",
                )
            return saved - origin
        path = parameter.removesuffix(".weight")
        change = self._change(source, path) if path != parameter else None
        if change is None:
            return np.zeros_like(origin)
        conv1d = source.config.data.get("fan_in_fan_out") is True
        square = change.shape[0] == change.shape[1]
        fits = change.shape == origin.shape and not (conv1d and square)
        turned = source.modules[path].embedding or not fits
        return change.T if turned else change

    def _places(self, parameter: str) -> tuple[Part, ...]:
        """Where the base has a parameter; a tied output embedding lies where the input one does."""
        assert self._names is not None and self._base is not None  # noqa: S101, PT018
        found = self._names.find(parameter)
        tied = self._base.config.get("tie_word_embeddings") is True
        if found or not tied or parameter != f"{self._names.output_embedding()}.weight":
            return found
        return self._names.find(f"{self._names.input_embedding()}.weight")

    def nbytes(self, path: str) -> int:
        """Bytes of the factors of one module, of all adapters."""
        return sum(
            source.tensors.spec(name).nbytes
            for source in self._sources
            if path in source.modules
            for name in source.modules[path].parts.values()
        )


def _as_factors(matrix: Array) -> Factored:
    """A matrix as a product that is exact: itself and the identity."""
    out, inputs = matrix.shape
    whole = matrix.astype(np.float32)
    if out >= inputs:
        return Factored(whole, np.eye(inputs, dtype=np.float32), 1.0)
    return Factored(np.eye(out, dtype=np.float32), whole, 1.0)
