"""A base with adapters on it, as a checkpoint: ask it for rows, and the adapters are in them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mergekit_lite.adapters.config import AdapterConfig
from mergekit_lite.adapters.edits import Computed, Edit, LowRank
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.plan import AdapterPlan, WholeSet, bind
from mergekit_lite.adapters.tensors import AdapterTensors
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, Rows, TensorReader, TensorSpec
from mergekit_lite.dtypes import DTYPES, Array, DType
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.cast import decode

__all__ = ["AdaptedCheckpoint", "AdaptedReader", "Adapter", "LoraAdapter", "PeftAdapter"]


class Adapter(Protocol):
    """An adapter that was planned for a base."""

    @property
    def config(self) -> AdapterConfig:
        """What it says of itself."""

    @property
    def tensors(self) -> Checkpoint:
        """Its tensors."""

    @property
    def plan(self) -> AdapterPlan:
        """What it changes; of an adapter that PEFT computes, only what the base has not."""

    @property
    def targets(self) -> frozenset[str]:
        """Names of the tensors that it changes."""

    def edits(self, name: str, origin: str, work: np.dtype[Any]) -> list[Edit]:
        """What it does to a tensor that begins as the base's tensor ``origin``."""


class LoraAdapter:
    """LoRA and its kin, on the streamed path."""

    def __init__(
        self, config: AdapterConfig, tensors: Checkpoint, base: Checkpoint, plan: AdapterPlan
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.plan = plan
        self.targets = frozenset(plan.edits)
        self._base = base
        self._decoded = AdapterTensors(tensors)

    def edits(self, name: str, origin: str, work: np.dtype[Any]) -> list[Edit]:
        """Bind what was planned for a tensor."""
        planned = self.plan.edits.get(name, ())
        return [bind(edit, self._decoded, self._base, origin, work) for edit in planned]


class PeftAdapter:
    """An adapter of another type, whose merged weights PEFT's own layers compute."""

    def __init__(
        self, config: AdapterConfig, tensors: Checkpoint, base: Checkpoint, names: ModelNames
    ) -> None:
        from mergekit_lite.adapters.foreign import ForeignAdapter

        self.config = config
        self.tensors = tensors
        self._base = base
        self._foreign = ForeignAdapter(config, tensors, base, names)
        added = self._foreign.added
        self.plan = AdapterPlan(
            {name: (WholeSet(own),) for name, own in added.items()},
            self._foreign.copied,
            {name: tensors.spec(own) for name, own in added.items()},
            self._foreign.notes,
        )
        self.targets = frozenset(self._foreign.targets)

    def edits(self, name: str, origin: str, work: np.dtype[Any]) -> list[Edit]:
        """Have the whole tensor computed when its first rows are read."""
        compute = lambda: self._foreign.merged(name).astype(work, copy=False)  # noqa: E731
        return [Computed(compute, self._base.spec(origin))]


@dataclass(frozen=True)
class _Weighted:
    adapter: Adapter
    weight: float


class AdaptedCheckpoint(Checkpoint):
    """``base + Σ weightᵢ · (adapterᵢ(base) - base)``.

    What adapters change is computed in float32 (float64 for a base in float64) and has that type;
    everything else is the base's. A single adapter of weight 1 is applied as it is, so that what it
    replaces is replaced exactly.

    Raises:
        PackError: Adapters cannot be combined.
    """

    def __init__(
        self, label: str, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
    ) -> None:
        self.label = label
        self.folder: Path | None = base.folder
        self._base = base
        self._adapters = [_Weighted(adapter, weight) for adapter, weight in adapters]
        self._copied: dict[str, str] = {}
        self._added: dict[str, Adapter] = {}
        for adapter, weight in adapters:
            self._copied |= adapter.plan.copied
            for name in adapter.plan.added:
                if name in self._added or weight != 1.0:
                    raise PackError(
                        f"{adapter.config.label}: carries '{name}', which the base has not, so it "
                        "can be neither weighted nor added to another",
                        "Use this adapter alone, with weight 1.",
                    )
                self._added[name] = adapter
        self.config = self._config(base.config)
        self._touched = frozenset().union(*(a.targets for a, _ in adapters))

    @property
    def notes(self) -> list[str]:
        """What the user should know of the adapters."""
        return [note for weighted in self._adapters for note in weighted.adapter.plan.notes]

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted({*self._base.names(), *self._copied, *self._added})

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor: float32 or float64 for those that are computed."""
        if name in self._added:
            return self._added[name].plan.added[name]
        stored = self._base.spec(self._copied.get(name, name))
        if name not in self._touched:
            return stored
        return TensorSpec(stored.shape, DTYPES["F64" if stored.dtype.name == "F64" else "F32"])

    def kept_dtype(self, name: str) -> DType:
        """The base's, or that of an adapter that brings the tensor."""
        if name in self._added:
            return self._added[name].plan.added[name].dtype
        return self._base.kept_dtype(self._copied.get(name, name))

    def file_of(self, name: str) -> str | None:
        """The base's file, of a tensor that no adapter changes."""
        if name in self._added or name in self._touched:
            return None
        return self._base.file_of(self._copied.get(name, name))

    def open(self, name: str) -> TensorReader:
        """Open a tensor; factors are read when its first rows are."""
        if name in self._added:
            return self._added[name].tensors.open(self._carried(name))
        origin = self._copied.get(name, name)
        if name not in self._touched:
            return self._base.open(origin)
        spec = self.spec(name)
        work = np.dtype(spec.dtype.storage)
        chains = [
            _Chain(weighted.adapter.edits(name, origin, work), weighted.weight)
            for weighted in self._adapters
            if name in weighted.adapter.targets
        ]
        return AdaptedReader(spec, self._base.open(origin), chains)

    def _carried(self, name: str) -> str:
        """The adapter's own name for a tensor that the base has not."""
        [edit] = self._added[name].plan.edits[name]
        carried: str = edit.name  # type: ignore[union-attr]
        return carried

    def prefetch(self, name: str) -> None:
        """Ask for the base's bytes; factors are small."""
        if name not in self._added:
            self._base.prefetch(self._copied.get(name, name))

    def fingerprint(self) -> str:
        """Those of the base and of the adapters."""
        return "\n".join(
            [
                self._base.fingerprint(),
                *(
                    f"{w.weight!r} {json.dumps(w.adapter.config.data, sort_keys=True)} "
                    f"{w.adapter.tensors.fingerprint()}"
                    for w in self._adapters
                ),
            ]
        )

    def input_files(self) -> list[InputFile]:
        """The files of the base; those of the adapters are their own."""
        return self._base.input_files()

    def close(self) -> None:
        """Close base and adapters."""
        self._base.close()
        for weighted in self._adapters:
            weighted.adapter.tensors.close()

    def _config(self, config: Mapping[str, object]) -> dict[str, object]:
        new: dict[str, object] = json.loads(json.dumps(config))
        if self._copied:
            new["tie_word_embeddings"] = False
        return new


@dataclass(frozen=True)
class _Chain:
    """What one adapter does to one tensor."""

    edits: Sequence[Edit]
    weight: float

    @property
    def sum_only(self) -> LowRank | None:
        """The one edit, where it adds the same whatever it is added to."""
        edit = self.edits[0]
        alone = len(self.edits) == 1 and isinstance(edit, LowRank) and edit.linear
        return edit if alone and isinstance(edit, LowRank) else None

    def apply(self, rows: Rows, values: Array) -> None:
        for edit in self.edits:
            edit.apply(rows, values)


class AdaptedReader(TensorReader):
    """One tensor of the base, with what the adapters do to it."""

    def __init__(self, spec: TensorSpec, base: TensorReader, chains: Sequence[_Chain]) -> None:
        self.spec = spec
        self._base = base
        self._chains = chains
        self._own = max(edit.passes for chain in chains for edit in chain.edits)
        self._kept: dict[Rows, Array] | None = None

    @property
    def passes(self) -> int:  # type: ignore[override]
        """Those of the base, then one if lengths of columns are needed."""
        return self._base.passes + self._own

    def observe(self, index: int, rows: Rows) -> None:
        """Let the base, then the edits, see one chunk."""
        if index < self._base.passes:
            self._base.observe(index, rows)
            return
        stored = self._base.spec.dtype
        raw = np.empty(rows.size * self.spec.columns, stored.storage)
        self._base.read(rows, raw)
        if self._kept is not None:
            self._kept[rows] = raw
        for chain in self._chains:
            flat = np.empty(raw.size, self.spec.dtype.storage)
            decode(raw, stored, flat)
            values = flat.reshape(rows.size, self.spec.columns)
            for edit in chain.edits:
                if edit.passes:
                    edit.observe(rows, values)
                    break
                edit.apply(rows, values)

    def settle(self, index: int) -> None:
        """Finish a pass."""
        if index < self._base.passes:
            self._base.settle(index)
            return
        for chain in self._chains:
            for edit in chain.edits:
                edit.settle()

    @property
    def far(self) -> bool:
        """Whether the base is."""
        return self._base.far

    @property
    def origin(self) -> Hashable:
        """That of the base's tensor."""
        return self._base.origin

    def read(self, rows: Rows, out: Array) -> None:
        """Write adapted rows."""
        self.read_base(rows, out)
        self.change(rows, out, out)

    def change(self, rows: Rows, source: Array, out: Array) -> None:
        """Adapt decoded rows of the base.

        Args:
            rows: Which.
            source: The base's, flat, of the working type.
            out: Written; may be ``source`` itself.
        """
        shape = rows.size, self.spec.columns
        base, values = source.reshape(shape), out.reshape(shape)
        sums = [chain.sum_only for chain in self._chains]
        if len(self._chains) == 1 and self._chains[0].weight == 1.0 and sums[0] is None:
            if out is not source:
                values[:] = base
            self._chains[0].apply(rows, values)
            return
        if out is source and not all(sums):
            base = base.copy()
        begun = out is source
        for chain, lora in zip(self._chains, sums, strict=True):
            if lora is not None:
                lora.add(rows, values if begun else base, values, chain.weight)
            else:
                changed = base.copy()
                chain.apply(rows, changed)
                changed -= base
                changed *= changed.dtype.type(chain.weight)
                np.add(values if begun else base, changed, out=values)
            begun = True

    def resident_bytes(self) -> int:
        """Bytes of the base's rows as they are stored, and what the base holds itself."""
        if not self.passes:
            return 0
        own = self.spec.elements * self._base.spec.dtype.itemsize if self._own else 0
        return own + self._base.resident_bytes()

    def keep(self) -> None:
        """Hold the base's rows from the pass that looks at them until they are read."""
        self._kept = {} if self._own else None
        if self._base.passes:
            self._base.keep()

    def close(self) -> None:
        """Let go of held rows and factors, and close the base."""
        self._kept = None
        for chain in self._chains:
            for edit in chain.edits:
                edit.close()
        self._base.close()

    def read_base(self, rows: Rows, out: Array) -> None:
        """Read and decode rows of the base into a flat array of the working type."""
        stored = self._base.spec.dtype
        raw = self._kept.pop(rows, None) if self._kept is not None else None
        if raw is None and stored == self.spec.dtype:
            self._base.read(rows, out)
            return
        if raw is None:
            raw = np.empty(out.size, stored.storage)
            self._base.read(rows, raw)
        decode(raw, stored, out)
