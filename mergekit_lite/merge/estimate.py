"""How long a merge will take, and on what: arithmetic over a plan and measured rates.

What a file of the result costs a core follows from its tensors::

    work(file) = Σ tensors (elements × rate(kind) + cost of a tensor)
               + bytes read whose digest is unknown × hashing

A *kind* is all tensors that cost the same for each element: method, number of models, types,
parameters up to their size. `merge.calibrate` measures its rate on this machine, from reading the
sources out of memory to the digest of what is written. Rates are seconds of processor time, so that
they hold on machines that have nothing else to do; here, where a thread may get only a *share* of a
core, its seconds are divided by that.

One machine: its threads share every file, so compute is
``Σ work / threads / share``. Files are hashed from
first to last, one after the other, which no number of threads makes faster: ``bytes written ×
hashing``. Reading (what the page cache does not hold), computing, hashing and writing overlap::

    time = start + max(read, compute, hash, write) + flush of what is on its way to the disk

A cluster: a file is a task on one slot, a slot is ``threads`` cores of a node, and files go in
order to the first slot that is free. The busiest node decides for network and disk, the last slot
for compute; what these exceed the even share by is the *tail*. Every byte that a file needs comes
to its node over the network once for each pass over the model, and every byte of the result leaves
once; both directions of the network work at once. Digests that are not known are taken as the bytes
pass. Through a disk that is stated goes all that a node reads and writes::

    time = start + max(network, shared storage, disk, compute)
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mergekit_lite.dtypes import DTYPES
from mergekit_lite.kernels.cast import in_kernel
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.merge.plan import Plan, PlannedTensor, scratch_bytes

__all__ = [
    "Cluster", "Estimate", "Kind", "Kinds", "Load", "Rates", "ShardLoad", "Stage", "Stored",
    "budget_of", "estimate_cluster", "estimate_local", "kinds_of", "load_of",
]  # fmt: skip

FLUSH_BYTES = 8 << 22
"""What is on its way to the disk when the last byte is computed: the window of `merge.segments`."""
_FIXED = 64 * 10**6
TASK_SECONDS = 0.02
"""For a scheduler to hand out a task and to take its result."""


@dataclass(frozen=True)
class Kind:
    """Tensors of a plan that cost the same for each element.

    Attributes:
        signature: What they have in common, in words.
        example: One of them, of the size that half of the elements lie in tensors of or below.
        sources: Types of its models, then of its base, as their readers give them.
        elements: Of all of them.
        kept: Whether their rows are held between the passes.
    """

    signature: str
    example: PlannedTensor
    sources: tuple[str, ...]
    elements: int
    kept: bool


@dataclass(frozen=True)
class Kinds:
    """A plan's tensors by kind.

    Attributes:
        plan: Whose.
        inputs: Its models.
        kinds: By signature; that of most elements first.
        of: Signature by a tensor's name.
    """

    plan: Plan
    inputs: Inputs
    kinds: Mapping[str, Kind]
    of: Mapping[str, str]


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
    """

    shards: Sequence[ShardLoad]
    rates: Rates
    chain: int
    what: str
    missing: Sequence[str] = ()
    adapted: bool = False

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


@dataclass(frozen=True)
class Cluster:
    """Machines that work on one merge.

    Attributes:
        nodes: How many.
        cores: Of each.
        threads: Cores that work on one file.
        network: Bytes a second of a node in each direction; None if it does not matter.
        disk: Bytes a second of a node's own disk; None if nothing passes over it.
        shared: Bytes a second that the storage gives and takes for all nodes; None if no limit.
    """

    nodes: int
    cores: int
    threads: int = 1
    network: float | None = None
    disk: float | None = None
    shared: float | None = None

    @property
    def slots(self) -> int:
        """How many files are worked on at once."""
        return self.nodes * max(1, self.cores // self.threads)


@dataclass(frozen=True)
class Stage:
    """One of the things that overlap.

    Attributes:
        name: network, storage, disk, read, write, compute or hash.
        even: Seconds if all nodes and slots had the same to do.
        seconds: Seconds of the busiest.
        reason: What the number follows from.
    """

    name: str
    even: float
    seconds: float
    reason: str

    @property
    def tail(self) -> float:
        """Seconds in which some have nothing left to do."""
        return self.seconds - self.even


@dataclass(frozen=True)
class Estimate:
    """How long a merge takes.

    Attributes:
        seconds: From start to end.
        start: Of which start and end of the program.
        flush: Of which waiting for the disk after the last byte is computed.
        work: Seconds of one core for all of it.
        stages: What overlaps; the longest first.
        where: The machine or cluster.
        notes: What the numbers leave out.
    """

    seconds: float
    start: float
    flush: float
    work: float
    stages: Sequence[Stage]
    where: str
    notes: Sequence[str] = field(default=())

    @property
    def bottleneck(self) -> str:
        """Name of the longest stage."""
        return self.stages[0].name

    def describe(self) -> dict[str, Any]:
        """The estimate as data for JSON, in seconds."""
        return {
            "seconds": self.seconds,
            "bottleneck": self.bottleneck,
            "where": self.where,
            "start": self.start,
            "flush": self.flush,
            "work": self.work,
            "stages": [
                {"name": s.name, "seconds": s.seconds, "even": s.even, "tail": s.tail,
                 "reason": s.reason}
                for s in self.stages
            ],
            "notes": list(self.notes),
        }  # fmt: skip


def budget_of(plan: Plan, memory: int, threads: int) -> int:
    """Bytes that a run with so much memory may hold between the passes of its tensors."""
    return max(0, memory - _FIXED - scratch_bytes(plan, threads))


def kinds_of(plan: Plan, inputs: Inputs, memory: int) -> Kinds:
    """Sort a plan's tensors into kinds; the kind of most elements comes first.

    Args:
        plan: Any plan.
        inputs: Its models.
        memory: Bytes that may be held between the passes of a tensor.
    """
    groups: dict[_Look, list[PlannedTensor]] = {}
    for tensor in plan.tensors.values():
        groups.setdefault(_look(plan, inputs, memory, tensor), []).append(tensor)
    kinds: dict[str, Kind] = {}
    of: dict[str, str] = {}
    signed: dict[str, list[PlannedTensor]] = {}
    for look, members in groups.items():
        signature = _signature(plan, look, members[0])
        together = signed.setdefault(signature, [])
        together += members
        of |= dict.fromkeys((tensor.name for tensor in members), signature)
        elements = sum(t.spec.elements for t in together)
        example = _middle(together, elements)
        kinds[signature] = Kind(signature, example, look.sources, elements, look.kept)
    ordered = sorted(kinds.items(), key=lambda item: -item[1].elements)
    return Kinds(plan, inputs, dict(ordered), of)


def _middle(members: Sequence[PlannedTensor], elements: int) -> PlannedTensor:
    seen = 0
    for tensor in sorted(members, key=lambda t: t.spec.elements):
        seen += tensor.spec.elements
        if 2 * seen >= elements:
            return tensor
    return members[-1]


class _Look(NamedTuple):
    """What tells tensors of different kinds apart, parameters to the last digit."""

    method: str
    models: int
    sources: tuple[str, ...]
    written: str
    parameters: tuple[object, ...]
    kept: bool


def _look(plan: Plan, inputs: Inputs, memory: int, tensor: PlannedTensor) -> _Look:
    sources = tuple(inputs[m].checkpoint.spec(name).dtype.name for m, name in tensor.sources)
    first = DTYPES[sources[0]]
    native = len(set(sources)) == 1 and in_kernel(first)
    width = first.itemsize if native else plan.work.itemsize
    return _Look(
        tensor.method,
        len(tensor.models),
        sources,
        tensor.spec.dtype.name,
        tuple(tensor.parameters.values()),
        kept=tensor.spec.elements * len(sources) * width <= memory,
    )


def _signature(plan: Plan, look: _Look, tensor: PlannedTensor) -> str:
    if look.method == "copy":
        return f"copy {look.sources[0]}"
    models = f"{look.models} models" + (" and a base" if tensor.base else "")
    types = "+".join(dict.fromkeys(look.sources))
    words = [
        f"{look.method}, {models}, {types} to {look.written} in {plan.work.name}",
        *(f"{name}={_size(value)}" for name, value in tensor.parameters.items()),
    ]
    return " ".join(words) + ("" if look.kept else ", read again for each pass")


def _size(value: object) -> str:
    """A parameter without its exact value: only 0 and 1 may cost less than what lies between."""
    if isinstance(value, tuple):
        return "/".join(dict.fromkeys(map(_size, value)))
    if isinstance(value, float):
        return f"{value:g}" if value in (0.0, 1.0) else "x"
    return str(value).lower()


def load_of(
    kinds: Kinds,
    rates: Rates,
    stored: Mapping[str, Stored],
    done: Collection[str] = (),
) -> Load:
    """Reckon what each file of a result costs.

    Args:
        kinds: Of the plan, from `kinds_of`.
        rates: Measured; kinds that they lack cost as much as the slowest that they have.
        stored: How each model lies on the disk, by its name; as in `Inputs`.
        done: Names of files that an earlier run finished.
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
    )


def _reads(
    tensor: PlannedTensor, inputs: Inputs, heads: Mapping[str, str]
) -> dict[str, tuple[str, int]]:
    """Bytes of the stored tensors, each once: by reference, the model's name and the bytes."""
    return {
        heads[model]: (model, inputs[model].checkpoint.stored(name)[1])
        for model, name in reversed(tensor.sources)
    }


def estimate_local(
    load: Load,
    threads: int,
    read: float | None = None,
    write: float | None = None,
) -> Estimate:
    """Estimate a merge on this machine.

    Args:
        load: From `load_of`.
        threads: Worker threads, each with a core.
        read: Bytes a second from the disk, if not as measured.
        write: Bytes a second to the disk, if not as measured.
    """
    rates = load.rates
    reading, writing = read or rates.reading, write or rates.writing
    cold = sum(shard.cold for shard in load.shards)
    unknown = sum(shard.unknown for shard in load.shards)
    compute = load.work / threads / rates.share
    hashed = rates.hashing / min(1.0, rates.share)
    chain = max(load.written, load.chain) * hashed
    start = max(rates.start, rates.waiting)
    stages = [
        _plain("compute", compute, f"{_computing(load, threads)}{_shared(rates)}"),
        _plain("hash", chain, f"{_bytes(max(load.written, load.chain))} in their order at "
               f"{_rate(1 / hashed)}; {_bytes(unknown)} of inputs have no known digest"),
        _plain("read", cold / reading,
               f"{_bytes(cold)} that memory does not hold at {_rate(reading)}"),
        _plain("write", load.written / writing, f"{_bytes(load.written)} at {_rate(writing)}"),
    ]  # fmt: skip
    stages.sort(key=lambda stage: -stage.seconds)
    flush = min(load.written, FLUSH_BYTES) / writing if load.shards else 0.0
    return Estimate(
        seconds=start + stages[0].seconds + flush,
        start=start,
        flush=flush,
        work=rates.start + load.work,
        stages=stages,
        where=f"this machine, {threads} thread{'s' * (threads != 1)}",
        notes=tuple(_notes(load)),
    )


def estimate_cluster(load: Load, cluster: Cluster) -> Estimate:
    """Estimate a merge on several machines.

    Args:
        load: From `load_of`.
        cluster: The machines; where neither network nor disk is stated, a disk as measured here.
    """
    rates = load.rates
    done, taken, given = _assign(load, cluster)
    nodes = cluster.nodes
    even = load.work / cluster.threads / cluster.slots
    busy = min(cluster.slots, len(load.shards))
    stages = [
        Stage(
            "compute", even, done,
            f"{_computing(load, cluster.slots * cluster.threads)}; "
            f"{_count(len(load.shards), 'file')} over {_count(cluster.slots, 'slot')}, "
            f"{busy} busy",
        )
    ]  # fmt: skip
    if cluster.network:
        stages.append(Stage(
            "network",
            max(load.read, load.written) / nodes / cluster.network,
            max(*taken, *given) / cluster.network,
            f"{_bytes(load.read)} in and {_bytes(load.written)} out, "
            f"{_count(nodes, 'node')} at {_bits(cluster.network)} each way",
        ))  # fmt: skip
    if cluster.shared:
        seconds = (load.read + load.written) / cluster.shared
        reason = f"{_bytes(load.read + load.written)} at {_rate(cluster.shared)} for all nodes"
        stages.append(_plain("storage", seconds, reason))
    disk = cluster.disk
    if disk is None and not cluster.network and not cluster.shared:
        disk = min(rates.reading, rates.writing)
    if disk:
        stages.append(Stage(
            "disk",
            (load.read + load.written) / nodes / disk,
            max(a + b for a, b in zip(taken, given, strict=True)) / disk,
            f"{_bytes(load.read)} in and {_bytes(load.written)} out, "
            f"{_count(nodes, 'node')} at {_rate(disk)}",
        ))  # fmt: skip
    stages.sort(key=lambda stage: -stage.seconds)
    return Estimate(
        seconds=rates.start + stages[0].seconds,
        start=rates.start,
        flush=0.0,
        work=rates.start + load.work,
        stages=stages,
        where=f"{_count(nodes, 'node')} of {_count(cluster.cores, 'core')}",
        notes=tuple(_notes(load)),
    )


def _assign(load: Load, cluster: Cluster) -> tuple[float, list[int], list[int]]:
    """Give files to slots: the end of the last, and bytes in and out of each node."""
    taken, given = [0] * cluster.nodes, [0] * cluster.nodes
    # Slots count through the nodes first, so that few files go to many nodes.
    free = [(0.0, slot) for slot in range(cluster.slots)]
    end = 0.0
    for shard in load.shards:
        began, slot = heapq.heappop(free)
        ends = began + shard.work / cluster.threads + TASK_SECONDS
        heapq.heappush(free, (ends, slot))
        end = max(end, ends)
        taken[slot % cluster.nodes] += shard.read
        given[slot % cluster.nodes] += shard.written
    return end, taken, given


def _plain(name: str, seconds: float, reason: str) -> Stage:
    return Stage(name, seconds, seconds, reason)


def _computing(load: Load, cores: int) -> str:
    speed = load.read / load.work if load.work else 0.0
    return f"{_count(cores, 'core')} that take {_rate(speed)} of input each ({load.what})"


def _shared(rates: Rates) -> str:
    """What is said where other programs take a tenth or more of the cores."""
    return f", of which a thread gets {rates.share:.0%}" if rates.share < 0.9 else ""


def _notes(load: Load) -> Iterator[str]:
    if load.missing:
        yield f"not measured, taken as the slowest that was: {'; '.join(load.missing[:3])}"
    if load.adapted:
        yield "the time does not contain the products of adapters' factors"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.2f} GB/s" if speed >= 1e8 else f"{speed / 1e6:.1f} MB/s"


def _bits(speed: float) -> str:
    bits = speed * 8
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"
