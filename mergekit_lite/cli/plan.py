"""pack plan."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.estimating import RATE, estimate, estimate_lines, rates_as_data
from mergekit_lite.cli.options import ENGINE, SIZE, complete_merge, split_method
from mergekit_lite.text import human_bytes, plain

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.locate import Source
    from mergekit_lite.estimate.times import Cluster
    from mergekit_lite.merge.plan import Plan, PlannedTensor
    from mergekit_lite.merge.run import Prepared

__all__ = ["command"]


@click.command("plan", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "words", nargs=-1, required=True, metavar="[METHOD] RECIPE", shell_complete=complete_merge
)
@click.option("--memory", type=SIZE, default="512MB", show_default=True, help="Memory for weights.")
@click.option(
    "--threads", type=click.IntRange(1, 1024),
    help="Worker threads; with --engine ray, cores for one file.  [default: all cores; 1]",
)  # fmt: skip
@click.option("--shard-size", type=SIZE, default="2GB", show_default=True, help="Bytes of a file.")
@click.option("--tensors", is_flag=True, help="Show every tensor.")
@click.option(
    "--engine", type=ENGINE, default="local", show_default=True,
    help="What would run it; with ray, the time on --nodes is estimated.",
)  # fmt: skip
@click.option("--nodes", type=click.IntRange(1), help="Machines of the cluster.  [default: 1]")
@click.option("--cores", type=click.IntRange(1), help="Cores of each.  [default: as many as here]")
@click.option("--network", type=RATE, metavar="RATE", help="Of each machine, for example 25Gbit.")
@click.option(
    "--disk", type=RATE, metavar="RATE", help="Of each machine's disk, for example 2GB/s."
)
@click.option(
    "--shared-disk", type=RATE, metavar="RATE", help="Of the storage that all machines share."
)
@click.option("--measure", is_flag=True, help="Measure this machine again for the estimate.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan for programs.")
def command(
    words: tuple[str, ...],
    memory: int,
    threads: int | None,
    shard_size: int,
    tensors: bool,
    engine: str,
    nodes: int | None,
    cores: int | None,
    network: float | None,
    disk: float | None,
    shared_disk: float | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Show what RECIPE would do: tensors, methods, bytes, memory, time. Reads headers only.

    Time follows from what this machine was measured to do with random weights, which takes some
    seconds, once for a kind of merge: with --measure, and with --engine ray.
    """
    from mergekit_lite.checkpoint.locate import looking
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import check_memory, default_threads, prepare
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe

    method, path = split_method(words)
    check_memory(memory)
    if engine == "local" and any(
        given is not None for given in (nodes, cores, network, shared_disk)
    ):
        raise click.UsageError("--nodes, --cores, --network and --shared-disk go with --engine ray")
    cluster = (
        _cluster(nodes, cores, threads, network, disk, shared_disk) if engine == "ray" else None
    )
    recipe = read_recipe(path, METHODS, ALIASES, method)
    if recipe.output != "model":
        raise PackError(
            f"{path}: makes {recipe.output}; a plan is of a whole model",
            f"See what goes in: pack inspect {path}",
        )
    began = time.process_time()
    with looking():
        prepared = prepare(recipe, path.parent, max(1, shard_size))
    planning = time.process_time() - began
    try:
        found = estimate(prepared, memory, threads, cluster, disk, planning, measure=measure)
        if as_json:
            document = prepared.plan.describe()
            if found is not None:
                document["estimate"] = {**found[0].describe(), "rates": rates_as_data(found[1])}
            click.echo(json.dumps(document, indent=2))
            return
        for line in _summary(prepared, memory, threads or default_threads()):
            click.echo(line)
        if found is None:
            click.echo("time    not known; --measure finds out in some seconds")
        else:
            for line in estimate_lines(*found):
                click.echo(line)
        for line in _groups(prepared.plan, every=tensors):
            click.echo(line)
        for note in prepared.notes:
            click.echo(f"note: {note}")
        _licences(prepared, path.stem)
    finally:
        prepared.inputs.close()


def _cluster(
    nodes: int | None,
    cores: int | None,
    threads: int | None,
    network: float | None,
    disk: float | None,
    shared: float | None,
) -> Cluster:
    from mergekit_lite.estimate.times import Cluster
    from mergekit_lite.merge.run import default_threads

    cores = cores or default_threads()
    if threads is not None and threads > cores:
        raise click.UsageError(f"--threads {threads}: a machine has only {cores} cores")
    return Cluster(nodes or 1, cores, threads or 1, network, disk, shared)


def _licences(prepared: Prepared, stem: str) -> None:
    """What the models' licences leave, where any of them is known."""
    from mergekit_lite.release.licences.judge import judge_sources

    recipe = prepared.plan.recipe
    name = recipe.name if recipe.name != stem else None
    judged = judge_sources(
        list(prepared.inputs.sources.values()), recipe.license, name, recipe.licenses
    )
    if all(parent.licence is None for parent in judged.parents):
        return
    under = " or ".join(judged.verdict.release_as) or "any licence that keeps the obligations"
    click.echo(f"licence {under if not judged.verdict.conflicts else 'see the conflicts'}")
    for conflict in judged.verdict.conflicts:
        click.secho(plain(f"conflict: {conflict.sentence}"), fg="red")


def _summary(prepared: Prepared, memory: int, threads: int) -> Iterator[str]:
    from mergekit_lite.merge.run import peak_memory

    plan = prepared.plan
    reads = plan.input_bytes(prepared.inputs)
    peak = peak_memory(plan, memory, threads)
    passes = plan.passes
    yield f"{plan.recipe.name}: {plan.method.name}, {plan.method.formula}"
    for name, model in prepared.inputs.items():
        where = f" @ {model.source.revision[:12]}" if model.source.revision else ""
        role = " (config and tokenizer)" if name == plan.template else ""
        yield f"  {name}{where}: {len(model.checkpoint.names())} tensors{role}"
    yield f"reads   {human_bytes(reads)}" + (f", the whole {passes} times" if passes > 1 else "")
    yield from _network(prepared)
    files = f"{len(plan.shards)} file{'s' * (len(plan.shards) != 1)}"
    yield f"writes  {human_bytes(plan.output_bytes)} in {files}"
    yield f"memory  about {human_bytes(peak)} at its peak, {threads} threads"
    yield f"result  dist/{plan.recipe.name}/merged"


def _network(prepared: Prepared) -> Iterator[str]:
    """What comes over the network, how, and how long that takes at the rate of the last run."""
    from mergekit_lite.checkpoint.announce import announce
    from mergekit_lite.checkpoint.far.fetcher import FETCHER
    from mergekit_lite.checkpoint.far.traffic import known_rate
    from mergekit_lite.merge.checkpoint import MergeCheckpoint

    merged = MergeCheckpoint(prepared.plan, prepared.inputs)
    with FETCHER.noting():
        announce(merged.prefetch, merged.names())
    for reference, source in prepared.inputs.sources.items():
        for host, (wanted, size) in source.checkpoint.elsewhere().items():
            rate = known_rate(host)
            took = "" if rate is None else (
                f"; about {wanted / rate:.0f} s at the {rate * 8e-9:.2f} Gbit/s of the last run"
            )  # fmt: skip
            yield f"network {human_bytes(wanted)}, {_way(reference, source, wanted, size)}{took}"


def _way(reference: str, source: Source, wanted: int, size: int) -> str:
    """Whether a model will be read where it lies, or fetched whole first."""
    from mergekit_lite.checkpoint.far.address import is_far

    if is_far(reference) or source.notes:
        part = f", {human_bytes(size - wanted)} of it not at all" if wanted < 0.99 * size else ""
        return f"{reference} is read where it lies{part}"
    return (
        f"{reference} is fetched whole ({human_bytes(size)}), since the disk has room; "
        f"hf://{reference} is read where it lies"
    )


def _groups(plan: Plan, *, every: bool) -> Iterator[str]:
    """Tensors by method, type and parameters; one line each with ``every``."""
    groups: dict[tuple[str, str, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors.values():
        dtype = tensor.spec.dtype.name
        key = (tensor.method, dtype, _parameters(tensor))
        if every:
            shape = "×".join(str(n) for n in tensor.spec.shape)
            yield f"  {tensor.name}  {dtype} {shape or 'scalar'}  {tensor.method}  {key[2]}"
        groups.setdefault(key, []).append(tensor)
    if every:
        return
    yield "tensors"
    shown = sorted(groups.items(), key=lambda item: -sum(t.spec.nbytes for t in item[1]))
    for (method, dtype, parameters), members in shown[:20]:
        size = human_bytes(sum(t.spec.nbytes for t in members))
        example = f"{members[0].name}" + (f" … (+{len(members) - 1})" if len(members) > 1 else "")
        yield f"  {len(members):5}  {dtype:5} {size:>9}  {method}  {parameters}  {example}"
    if len(shown) > 20:
        yield f"  … {len(shown) - 20} more groups; see --tensors"


def _parameters(tensor: PlannedTensor) -> str:
    """A tensor's parameters in one line."""

    def show(value: object) -> str:
        if isinstance(value, tuple):
            return (
                "/".join(dict.fromkeys(show(v) for v in value))
                if len(set(value)) == 1
                else "/".join(map(show, value))
            )
        return f"{value:.4g}" if isinstance(value, float) else str(value).lower()

    return " ".join(f"{name}={show(value)}" for name, value in tensor.parameters.items())
