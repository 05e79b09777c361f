"""What each file of a result costs, from measured rates: seconds of a core, and bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lite.estimate.kinds import Kinds
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.merge.plan import PlannedTensor

__all__ = ["Load", "Rates", "ShardLoad", "Stored", "load_of"]


@dataclass(frozen=True)
class Rates:
    """What a core, and a machine, were measured to do.

    Attributes:
        elements: Seconds of one core for each element of the result, its digest included, by a
            kind's signature.
        tensor: Seconds of one core for each tensor, whatever its size.
        hashing: Seconds of one core for each byte hashed.
        start: Seconds of one core from the start of a process until it merges, and from the last
            byte to its end: interpreter, imports, compiled kernels, lock.
        waiting: The same by the clock, here.
        share: Part of a core that a thread got here, where other programs want some too.
        reading: Bytes a second from the disk.
        writing: Bytes a second to the disk.
        cores: Cores that were busy while it was measured.
        machine: Processor that was measured.
    """

    elements: Mapping[str, float]
    tensor: float
    hashing: float
    start: float
    reading: float
    writing: float
    waiting: float = 0.0
    share: float = 1.0
    cores: int = 1
    machine: str = ""


@dataclass(frozen=True)
class Stored:
    """How a model lies on the disk.

    Attributes:
        unknown: Share of its bytes whose digest is not known.
        cold: Share of its bytes that the page cache does not hold.
    """

    unknown: float = 0.0
    cold: float = 0.0


@dataclass(frozen=True)
class ShardLoad:
    """What one file of the result costs.

    Attributes:
        name: Of the file.
        work: Seconds of one core.
        read: Bytes of the inputs that it needs, in all passes over them.
        cold: Those of them that come from the disk.
        unknown: Those of them that are hashed.
        written: Bytes of the file.
    """

    name: str
    work: float
    read: int
    cold: int
    unknown: int
    written: int


@dataclass(frozen=True)
class Load:
    """What a plan costs, by file; the same wherever it runs.

    Attributes:
        shards: In the order of the plan.
        rates: That it was reckoned with.
        chain: Most bytes of one model that are hashed, in their order.
        what: The kind that most elements are of, in words.
        missing: Kinds whose rate is not known; that of the slowest known kind was taken.
        adapted: Whether a model has adapters, whose products no rate contains.
        planning: Seconds of one core to open the models and to plan.
    """

    shards: Sequence[ShardLoad]
    rates: Rates
    chain: int
    what: str
    missing: Sequence[str] = ()
    adapted: bool = False
    planning: float = 0.0

    @property
    def work(self) -> float:
        """Seconds of one core for all files."""
        return sum(shard.work for shard in self.shards)

    @property
    def read(self) -> int:
        """Bytes of the inputs, in all passes."""
        return sum(shard.read for shard in self.shards)

    @property
    def written(self) -> int:
        """Bytes of the result."""
        return sum(shard.written for shard in self.shards)


def load_of(
    kinds: Kinds,
    rates: Rates,
    stored: Mapping[str, Stored],
    done: Collection[str] = (),
    planning: float = 0.0,
) -> Load:
    """Reckon what each file of a result costs.

    Args:
        kinds: Of the plan, from `kinds_of`.
        rates: Measured; kinds that they lack cost as much as the slowest that they have.
        stored: How each model lies on the disk, by its name; as in `Inputs`.
        done: Names of files that an earlier run finished.
        planning: Seconds of one core that it took to open the models and to plan.
    """
    plan, inputs = kinds.plan, kinds.inputs
    slowest = max(rates.elements.values(), default=0.0)
    missing: dict[str, None] = {}
    heads = {name: model.source.sources[0].reference for name, model in inputs.items()}
    hashed: dict[str, float] = {}
    shards = []
    for shard in plan.shards:
        if shard.name in done:
            continue
        work = read = cold = unknown = 0.0
        for name in shard.header.entries:
            tensor = plan.tensors[name]
            if not tensor.spec.elements:
                work += rates.tensor
                continue
            signature = kinds.of[name]
            rate = rates.elements.get(signature)
            if rate is None:
                missing[signature] = None
                rate = slowest
            work += tensor.spec.elements * rate + rates.tensor
            # A base with several adapters is read once.
            for model, (source, size) in _reads(tensor, inputs, heads).items():
                there = stored.get(source, Stored())
                read += size
                cold += size * there.cold
                unknown += size * there.unknown
                hashed[model] = hashed.get(model, 0) + size * there.unknown
        passes = plan.passes
        shards.append(
            ShardLoad(
                name=shard.name,
                work=work + unknown * rates.hashing,
                read=int(read * passes),
                cold=int(cold),
                unknown=int(unknown),
                written=shard.size,
            )
        )
    what = next(iter(kinds.kinds), "").partition(" in ")[0]
    return Load(
        shards=shards,
        rates=rates,
        chain=int(max(hashed.values(), default=0)),
        what=what,
        missing=tuple(missing),
        adapted=any(model.source.parts for model in inputs.values()),
        planning=planning,
    )


def _reads(
    tensor: PlannedTensor, inputs: Inputs, heads: Mapping[str, str]
) -> dict[str, tuple[str, int]]:
    """Bytes of the stored tensors, each once: by reference, the model's name and the bytes."""
    return {
        heads[model]: (model, inputs[model].checkpoint.stored(name)[1])
        for model, name in reversed(tensor.sources)
    }
