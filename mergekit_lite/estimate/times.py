"""How long a merge will take, and on what: arithmetic over a plan and measured rates.

What a file of the result costs a core follows from its tensors::

    work(file) = Σ tensors (elements × rate(kind) + cost of a tensor)
               + bytes read whose digest is unknown × hashing

A *kind* is all tensors that cost the same for each element (`estimate.kinds`); its rate is measured
on this machine (`estimate.calibrate`), from reading the sources out of memory to the digest of what
is written. Rates are seconds of processor time, so that they hold on machines that have nothing
else to do; here, where other programs may leave a thread only a *share* of a core, its seconds are
divided by that.

One machine: its threads share every file, so compute is ``Σ work / threads / share``. Files are
hashed from first to last, one after the other, which no number of threads makes faster: ``bytes
written × hashing``. Reading (what the page cache does not hold), computing, hashing and writing
overlap::

    time = start + planning + max(read, compute, hash, write)
         + flush of what is on its way to the disk

A cluster: a file is a task on one slot, a slot is ``threads`` cores of a node, and files go in
order to the first slot that is free. The busiest node decides for network and disk, the last slot
for compute; what these exceed the even share by is the *tail*. Every byte that a file needs comes
to its node over the network once for each pass over the model, and every byte of the result leaves
once; both directions of the network work at once. Digests that are not known are taken as the bytes
pass. Through a disk that is stated goes all that a node reads and writes::

    time = start + 4 × planning + max(network, shared storage, disk, compute)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.estimate.load import Load, Rates
from mergekit_lite.text import human_bytes

__all__ = ["Cluster", "Estimate", "Stage", "estimate_cluster", "estimate_local"]

FLUSH_BYTES = 8 << 22
"""What is on its way to the disk when the last byte is computed: the window of `merge.segments`."""
TASK_SECONDS = 0.02
"""For a scheduler to hand out a task and to take its result."""
PLANNED = 4
"""Times in turn that a merge on a cluster is planned: by the program, when each node is asked
whether it can take part, by each worker before its first file, and in the end, to see that the
inputs are what they were."""


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
        planning: Of which opening the models and planning, as often as that is waited for.
        flush: Of which waiting for the disk after the last byte is computed.
        work: Seconds of one core for all of it.
        stages: What overlaps; the longest first.
        where: The machine or cluster.
        notes: What the numbers leave out.
    """

    seconds: float
    start: float
    planning: float
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
            "planning": self.planning,
            "flush": self.flush,
            "work": self.work,
            "stages": [
                {"name": s.name, "seconds": s.seconds, "even": s.even, "tail": s.tail,
                 "reason": s.reason}
                for s in self.stages
            ],
            "notes": list(self.notes),
        }  # fmt: skip


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
    planning = load.planning / rates.share
    stages = [
        _plain("compute", compute, f"{_computing(load, threads)}{_shared(rates)}"),
        _plain("hash", chain, f"{human_bytes(max(load.written, load.chain))} in their order at "
               f"{_rate(1 / hashed)}; {human_bytes(unknown)} of inputs have no known digest"),
        _plain("read", cold / reading,
               f"{human_bytes(cold)} that memory does not hold at {_rate(reading)}"),
        _plain("write", load.written / writing, f"{human_bytes(load.written)} at {_rate(writing)}"),
    ]  # fmt: skip
    stages.sort(key=lambda stage: -stage.seconds)
    flush = min(load.written, FLUSH_BYTES) / writing if load.shards else 0.0
    return Estimate(
        seconds=start + planning + stages[0].seconds + flush,
        start=start,
        planning=planning,
        flush=flush,
        work=rates.start + load.planning + load.work,
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
            f"{human_bytes(load.read)} in and {human_bytes(load.written)} out, "
            f"{_count(nodes, 'node')} at {_bits(cluster.network)} each way",
        ))  # fmt: skip
    if cluster.shared:
        seconds = (load.read + load.written) / cluster.shared
        reason = f"{human_bytes(load.read + load.written)} at {_rate(cluster.shared)} for all nodes"
        stages.append(_plain("storage", seconds, reason))
    disk = cluster.disk
    if disk is None and not cluster.network and not cluster.shared:
        disk = min(rates.reading, rates.writing)
    if disk:
        stages.append(Stage(
            "disk",
            (load.read + load.written) / nodes / disk,
            max(a + b for a, b in zip(taken, given, strict=True)) / disk,
            f"{human_bytes(load.read)} in and {human_bytes(load.written)} out, "
            f"{_count(nodes, 'node')} at {_rate(disk)}",
        ))  # fmt: skip
    stages.sort(key=lambda stage: -stage.seconds)
    planning = PLANNED * load.planning
    return Estimate(
        seconds=rates.start + planning + stages[0].seconds,
        start=rates.start,
        planning=planning,
        flush=0.0,
        work=rates.start + load.planning + load.work,
        stages=stages,
        where=f"{_count(nodes, 'node')} of {_count(cluster.cores, 'core')}",
        notes=tuple(_notes(load)),
    )


def _assign(load: Load, cluster: Cluster) -> tuple[float, list[int], list[int]]:
    """Give files to slots: the end of the last, and bytes in and out of each node."""
    # Slots count through the nodes first, so that few files go to many nodes; the others stay free.
    slots = min(cluster.slots, max(1, len(load.shards)))
    nodes = min(cluster.nodes, slots)
    taken, given = [0] * nodes, [0] * nodes
    free = [(0.0, slot) for slot in range(slots)]
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


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.2f} GB/s" if speed >= 1e8 else f"{speed / 1e6:.1f} MB/s"


def _bits(speed: float) -> str:
    bits = speed * 8
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"
