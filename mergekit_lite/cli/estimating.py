"""What `pack plan` says of time: options for machines, and the estimate in lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergekit_lite.estimate.load import Rates
    from mergekit_lite.estimate.times import Cluster, Estimate
    from mergekit_lite.merge.run import Prepared

__all__ = ["RATE", "Rate", "estimate", "estimate_lines", "rates_as_data"]

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Rate(click.ParamType[float]):
    """Bytes a second: ``25Gbit``, ``10Gbit/s``, ``2GB``, ``500MB/s``; capital ``B`` is bytes."""

    name = "rate"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read a rate, or fail with an example."""
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(
            r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]i?)?(bits?|bps|bytes?|B)(?:/s|ps)?\s*",
            str(value),
        )
        if match is None:
            self.fail(f"{value!r} is not a rate; write for example 25Gbit or 2GB/s", param, ctx)
        number, prefix, unit = float(match[1]), (match[2] or "").lower(), match[3]
        speed = number * (_PREFIXES.get(prefix) or _BINARY[prefix])
        if unit not in ("B", "byte", "bytes"):
            speed /= 8
        if speed <= 0:
            self.fail(f"{value!r} moves nothing; write for example 25Gbit or 2GB/s", param, ctx)
        return speed


RATE = Rate()


def estimate(
    prepared: Prepared,
    memory: int,
    threads: int | None,
    cluster: Cluster | None,
    disk: float | None,
    planning: float,
    *,
    measure: bool,
) -> tuple[Estimate, Rates] | None:
    """Estimate a merge; None where this machine was not measured and is not to be.

    Args:
        prepared: The planned merge.
        memory: Bytes for weights.
        threads: Worker threads on this machine; all cores if None.
        cluster: Machines to estimate for; this one if None.
        disk: Bytes a second of this machine's disk, if not as measured.
        planning: Seconds of one core that it took to prepare the merge.
        measure: Whether to measure, and to do so again where it was done.

    Raises:
        PackError: The current folder, whose disk is measured, cannot be written to.
    """
    from mergekit_lite.errors import PackError
    from mergekit_lite.estimate.calibrate import calibrate, known_rates, stored_of
    from mergekit_lite.estimate.kinds import budget_of, kinds_of
    from mergekit_lite.estimate.load import load_of
    from mergekit_lite.estimate.times import estimate_cluster, estimate_local
    from mergekit_lite.merge.run import default_threads

    plan, inputs = prepared.plan, prepared.inputs
    cores = default_threads()
    busy = cores if cluster is not None else min(threads or cores, cores)
    held = budget_of(plan, memory, busy)
    kinds = kinds_of(plan, inputs, held)
    rates = None if measure else known_rates(kinds, busy)
    if rates is None:
        if not measure and cluster is None:
            return None
        note = lambda text: click.echo(f"{text} …", err=True)  # noqa: E731
        try:
            rates = calibrate(kinds, held, busy, Path(), note)
        except OSError as error:
            raise PackError(
                f"{Path.cwd()}: its disk cannot be measured ({error.strerror or error})",
                "Run pack plan in a folder that you may write to, with 600 MB free.",
            ) from None
    load = load_of(kinds, rates, stored_of(inputs), planning=planning)
    if cluster is None:
        return estimate_local(load, busy, disk, disk), rates
    return estimate_cluster(load, cluster), rates


def estimate_lines(found: Estimate, rates: Rates) -> Iterator[str]:
    """An estimate as `pack plan` prints it."""
    first = found.stages[0]
    yield f"time    about {_time(found.seconds)} on {found.where}: {first.name}"
    for stage in found.stages:
        yield f"  {stage.name:<8} {_time(stage.even):>9}  {stage.reason}"
    if first.tail > 0.005 * found.seconds:
        yield f"  {'tail':<8} {_time(first.tail):>9}  until the busiest is done"
    if found.flush > 0.005 * found.seconds:
        yield f"  {'flush':<8} {_time(found.flush):>9}  what is on its way to the disk at the end"
    if found.planning > 0.005 * found.seconds:
        yield f"  {'plan':<8} {_time(found.planning):>9}  opening the models and planning"
    yield f"  {'start':<8} {_time(found.start):>9}  interpreter, compiled kernels, lock"
    cores = f"{rates.cores} core{'s' * (rates.cores != 1)} busy"
    yield f"  what is longest counts; rates were measured here, on {rates.machine}, {cores}"
    for note in found.notes:
        yield f"  {note}"


def rates_as_data(rates: Rates) -> dict[str, Any]:
    """Measured rates for JSON: seconds of one core for an element, a tensor and a byte hashed."""
    return {
        "machine": rates.machine,
        "cores": rates.cores,
        "seconds_per_element": dict(rates.elements),
        "seconds_per_tensor": rates.tensor,
        "seconds_per_byte_hashed": rates.hashing,
        "start_seconds": rates.start,
        "start_seconds_here": rates.waiting,
        "share_of_a_core_here": rates.share,
        "disk_read_bytes_per_second": rates.reading,
        "disk_write_bytes_per_second": rates.writing,
    }


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
