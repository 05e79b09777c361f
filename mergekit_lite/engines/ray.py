"""A Ray cluster: a task for each step and file of the result, one for the digests of each input.

The process that was started plans, hands out tasks, notes each finished file in the result's
journal and publishes; it reads no weights. A task is plain data and opens the inputs itself, so
nothing but names, digests and, where a method has one, a statistic over the whole model travels.

**Where a task runs.** Every node is asked first whether it has the inputs, the folder of the
result and the same versions; one that has not gets no task. Nodes whose own disks hold the inputs
are preferred to those that read them over a network, as far as they have room; between equals Ray's
SPREAD strategy gives every node its share. A task declares its threads as CPUs and its estimated
peak as memory, so a node runs as many as fit.

**What is lost.** Retries are counted here and not left to Ray: a file whose worker or node is lost
is asked for again, by whoever has room, and files that are finished stay; a step goes on where it
was, so it is given up only if it is lost again and again without getting any further. Where this
process dies, the next run continues from the journal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mergekit_lite.checkpoint.far.fetcher import FETCHER
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.engines import tasks
from mergekit_lite.engines.protocol import Computed, Engine, Step, Work
from mergekit_lite.engines.tasks import Asked, Failed, Written
from mergekit_lite.errors import Interrupted, PackError

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.protocol import InputFile
    from mergekit_lite.merge.run import Progress
    from mergekit_lite.merge.writer import ArtifactWriter

__all__ = ["RayEngine"]

_EVERY = 0.5
"""Seconds between two looks at how far files are."""

_MOST = 5
"""Times that one task is tried, before its loss is no accident."""

_STORE = 10**8
"""Bytes of the object store of a cluster that is started here; next to nothing goes into it."""

_REACH = 10.0
"""Seconds in which a cluster's address must answer."""


@dataclass(frozen=True)
class _Node:
    """A node that tasks can run on."""

    id: str
    cpus: int
    memory: float
    near: bool


@dataclass
class _Call:
    """One task, as often as it has to be tried."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    what: str
    take: Callable[[Any], None]
    lost: list[str] = field(default_factory=list)
    stepped: int = 0


class RayEngine(Engine):
    """Computes on a Ray cluster.

    Args:
        address: Of the cluster, ``auto`` for the one of this machine; None for ``RAY_ADDRESS`` or
            else one that is started on this machine for the run.
        threads: CPUs of a task; None for as many as keep the cluster's CPUs busy.

    Raises:
        PackError: Ray is not installed.
    """

    def __init__(self, address: str | None = None, threads: int | None = None) -> None:
        if find_spec("ray") is None:
            raise PackError(
                "--engine ray needs Ray, which is not installed",
                "Install it: pip install 'pack-models[ray]'",
            )
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._threads = threads
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Look whether anybody answers at an address, which Ray itself would try for minutes.

        Raises:
            PackError: Nobody does.
        """
        host, found, port = self._address.removeprefix("ray://").rpartition(":")
        if found and port.isdigit():
            try:
                socket.create_connection((host.strip("[]"), int(port)), _REACH).close()
            except OSError as error:
                raise _unreachable(self._address, error) from None
        return self

    def compute(
        self,
        work: Work,
        writers: Sequence[ArtifactWriter],
        threads: int,
        memory: int,
        progress: Progress,
    ) -> Computed:
        """Write every file that a work's writers lack."""
        progress.begin("Connect", 0)
        self._connect()
        run = uuid.uuid4().hex
        asked = Asked(
            origin=work.origin,
            fingerprints=list(work.fingerprints),
            partials=[writer.partial.absolute() for writer in writers],
            attempts=[writer.begin_attempts(run).absolute() for writer in writers],
            folder=Path.cwd(),
            versions={**tasks.versions(), **tasks.installed(work.libraries)},
            memory=memory,
            rehash=not KNOWN.enabled,
            cache=FETCHER.cache_bytes,
        )
        with _Run(asked, work, writers, progress) as started:
            return started.compute(self._threads)

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        # Whatever it is told, Ray prints what befalls workers, and where results for programs go.
        self._held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if ray.is_initialized():
            return
        own: dict[str, Any] = {}
        if self._address == "local":
            from mergekit_lite.merge.run import default_threads

            own = {"num_cpus": default_threads(), "object_store_memory": _STORE,
                   "include_dashboard": False}  # fmt: skip
        with _kept_signals():
            try:
                ray.init(
                    address=self._address, log_to_driver=False, logging_level=logging.ERROR, **own
                )
            except Exception as error:  # Ray has no type for a node that does not start in time
                raise _unreachable(self._address, error) from None
        self._held.callback(ray.shutdown)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cluster, and stop it if it was started here."""
        self._held.close()


def _unreachable(address: str, error: Exception) -> PackError:
    return PackError(
        f"{address}: no Ray cluster to be used ({_first_line(error)})",
        "Start one (ray start --head), name another (--address HOST:PORT), or leave --address out "
        "for one that is started for the run.",
    )


class _Run:
    """One work on its way; a context that leaves no task behind."""

    def __init__(
        self, asked: Asked, work: Work, writers: Sequence[ArtifactWriter], progress: Progress
    ) -> None:
        import ray

        self._ray = ray
        self._work = work
        self._writers = writers
        self._progress = progress
        self._attempts = asked.attempts
        self._memory = asked.memory
        self._asked = ray.put(asked)
        self._pending: dict[Any, _Call] = {}
        self._remotes: dict[Callable[..., Any], Any] = {}
        self._nodes: list[_Node] = []
        self._where: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
        self._recomputed = 0
        self._restarted = 0
        self._written = 0
        self._measure: Callable[[], int] = self._in_files
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for ref in self._pending:
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=True)
        if self._pending:
            with contextlib.suppress(Exception):
                self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=5)

    def compute(self, asked_threads: int | None) -> Computed:
        """Do all of it."""
        try:
            return self._compute(asked_threads)
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None

    def _compute(self, asked_threads: int | None) -> Computed:
        todo = [(number, shard) for number, writer in enumerate(self._writers)
                for shard in writer.missing()]  # fmt: skip
        self._look()
        steps = self._work.steps()
        step_threads = self._work.step_threads or asked_threads or self._share(len(steps))
        step_needs = self._needs(step_threads, self._work.step_bytes(step_threads)) if steps else {}
        threads = asked_threads or self._share(len(todo))
        needs = self._needs(threads, self._work.peak_bytes(self._memory, threads))
        statistic = self._settle() if todo or steps or self._work.checked else None
        weights: dict[str, list[InputFile]] = {}
        others = [self._digest_call(reference, weights) for reference in self._work.references]
        if steps:
            calls = [self._step_call(step, statistic, step_threads, step_needs) for step in steps]
            self._do([*calls, *others], sum(step.size for step in steps))
            others = []
        calls = [self._write_call(number, shard.name, statistic, threads, needs)
                 for number, shard in todo]  # fmt: skip
        if todo:
            self._progress.begin(self._work.title, sum(shard.size for _, shard in todo))
        self._gather([*calls, *others])
        self._progress.begin("Check inputs", 0)
        again = self._work.origin.open()
        again.close()
        if list(again.fingerprints) != list(self._work.fingerprints):
            raise PackError(
                "an input changed while it was being read",
                "Wait until whatever writes it is done, then run again.",
            )
        found: list[Any] = [None]
        if self._work.checked:
            self._gather([
                _Call(tasks.check, (statistic,), needs, "the check of the result", found.append)
            ])  # fmt: skip
        self._tell_lost("file", "computed", self._recomputed)
        self._tell_lost("step", "begun", self._restarted)
        ordered = {reference: weights[reference] for reference in self._work.references}
        return Computed(ordered, found[-1], self._recomputed + self._restarted)

    def _tell_lost(self, what: str, done: str, count: int) -> None:
        if count:
            many = count != 1
            self._progress.note(
                f"{count} {what}{'s were' if many else ' was'} {done} again, since "
                f"{'their workers were' if many else 'its worker was'} lost"
            )

    def _look(self) -> None:
        """Ask every node whether tasks can run there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
        answers: dict[str, bool | Failed] = {}
        refs = {}
        for node in alive:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
            refs[node] = self._remote(tasks.look).options(**options).remote(self._asked)
        for node, ref in refs.items():
            try:
                answers[node] = self._get(ref)
            except _LostError as error:
                answers[node] = Failed(f"it was lost ({error})", "Look at its logs.")
        for node, answer in answers.items():
            if not isinstance(answer, Failed):
                has = alive[node]["Resources"]
                self._nodes.append(
                    _Node(node, int(has.get("CPU", 0)), has.get("memory", 0.0), answer)
                )
        refused = {n: a for n, a in answers.items() if isinstance(a, Failed)}
        if not self._nodes:
            first = next(iter(refused.values()), Failed("the cluster has no node", ""))
            raise PackError(first.message, first.hint)
        for node, answer in refused.items():
            self._progress.note(
                f"no task runs on the node {alive[node]['NodeManagerAddress']}: {answer.message}"
            )
        self._prefer(list(refused))

    def _prefer(self, refused: Sequence[str]) -> None:
        """Leave nodes out, and prefer those that are near to the inputs."""
        key = "ray.io/node-id"
        if refused:
            self._where["label_selector"] = {key: f"!in({','.join(refused)})"}
        near = [node.id for node in self._nodes if node.near]
        if 0 < len(near) < len(self._nodes):
            from ray.util.scheduling_strategies import In, NodeLabelSchedulingStrategy

            self._where["scheduling_strategy"] = NodeLabelSchedulingStrategy(
                hard={}, soft={key: In(*near)}
            )

    def _share(self, files: int) -> int:
        """CPUs for a task, so that all are used where there are fewer files than CPUs."""
        cpus = sum(node.cpus for node in self._nodes)
        most = max(node.cpus for node in self._nodes)
        return max(1, min(most, cpus // max(1, files)))

    def _needs(self, threads: int, peak: int) -> dict[str, Any]:
        """What a task needs of its node.

        Raises:
            PackError: No node has that much.
        """
        if not any(node.cpus >= threads and node.memory >= peak for node in self._nodes):
            most = max(node.cpus for node in self._nodes)
            largest = max(node.memory for node in self._nodes)
            raise PackError(
                f"a task needs {threads} CPUs and {peak / 1e9:.2f} GB; the nodes have up to {most} "
                f"CPUs and {largest / 1e9:.2f} GB",
                "Ask for less: --threads 1 --memory 256MB, or add a node.",
            )
        return {"num_cpus": threads, "memory": peak}

    def _settle(self) -> Any:
        """Have a statistic that spans the model settled by one task; None where there is none."""
        if self._work.statistic is None:
            return None
        threads = max(node.cpus for node in self._nodes)
        peak = self._work.peak_bytes(self._memory, threads)
        self._progress.begin("Trim", 0)
        found: list[Any] = []
        self._gather([
            _Call(tasks.settle, (threads,), self._needs(threads, peak), "a statistic", found.append)
        ])  # fmt: skip
        return self._ray.put(found[0])

    def _do(self, calls: Sequence[_Call], size: int) -> None:
        """Have steps done, and show how far they are by what lies beside the result."""
        before = self._work.stepped()
        self._progress.begin(self._work.steps_title, size)
        self._measure, self._shown = lambda: self._work.stepped() - before, 0
        self._gather(calls)
        self._measure, self._shown = self._in_files, 0

    def _step_call(self, step: Step, statistic: Any, threads: int, needs: dict[str, Any]) -> _Call:
        return _Call(tasks.do, (step, statistic, threads), needs, step.name, lambda _: None)

    def _write_call(
        self, number: int, name: str, statistic: Any, threads: int, needs: dict[str, Any]
    ) -> _Call:
        writer = self._writers[number]

        def take(written: Written) -> None:
            writer.take(name, written.sha256, written.nonfinite)
            self._written += writer.done[name]["bytes"]

        return _Call(tasks.write, (number, name, statistic, threads), needs, name, take)

    def _digest_call(self, reference: str, weights: dict[str, list[InputFile]]) -> _Call:
        def take(files: list[InputFile]) -> None:
            weights[reference] = files

        needs = {"num_cpus": 1, "memory": self._work.peak_bytes(0, 1)}
        return _Call(tasks.digest, (reference,), needs, f"digests of {reference}", take)

    def _gather(self, calls: Sequence[_Call]) -> None:
        """Run tasks until all are done, again where they are lost."""
        for call in calls:
            self._submit(call)
        while self._pending:
            ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=_EVERY)
            for ref in ready:
                call = self._pending.pop(ref)
                try:
                    outcome = self._get(ref)
                except _LostError as error:
                    self._again(call, str(error))
                    continue
                if isinstance(outcome, Failed):
                    raise PackError(outcome.message, outcome.hint)
                call.take(outcome)
            self._show()

    def _submit(self, call: _Call) -> None:
        options = {**call.options, **self._where, "max_retries": 0}
        remote = self._remote(call.function).options(**options)
        self._pending[remote.remote(self._asked, *call.arguments)] = call

    def _remote(self, function: Callable[..., Any]) -> Any:
        """Ray's handle of a function, which is sent to the cluster once."""
        if function not in self._remotes:
            self._remotes[function] = self._ray.remote(function)
        return self._remotes[function]

    def _again(self, call: _Call, why: str) -> None:
        if call.function is tasks.do:
            self._restarted += 1
            now = self._work.stepped()
            if now > call.stepped:
                call.lost.clear()
                call.stepped = now
        call.lost.append(why)
        if len(call.lost) >= _MOST:
            raise PackError(
                f"{call.what}: its worker was lost {_MOST} times, last: {why}",
                "If the nodes lack memory, give a smaller budget: --memory 256MB --threads 1",
            )
        if call.function is tasks.write:
            self._recomputed += 1
        self._submit(call)

    def _get(self, ref: Any) -> Any:
        """What a task gave back.

        Raises:
            _LostError: Its worker or node is no more.
        """
        from ray import exceptions

        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ModuleNotFoundError):
                raise PackError(
                    f"a node lacks what pack needs ({cause})",
                    "Install pack on all nodes, in the environment that Ray was started in.",
                ) from None
            raise cause if isinstance(cause, Exception) else error from None
        except (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.OutOfMemoryError,
            exceptions.ObjectLostError,
            exceptions.TaskUnschedulableError,
        ) as error:
            raise _LostError(_first_line(error)) from None
        except exceptions.RayError as error:
            raise PackError(
                f"the Ray cluster failed ({_first_line(error)})",
                "Run the same command to continue; finished files are kept.",
            ) from None

    def _show(self) -> None:
        """Tell how far it is."""
        done = self._measure()
        if done > self._shown:
            self._progress.advance(done - self._shown)
            self._shown = done

    def _in_files(self) -> int:
        """Bytes of files that are finished, and what is on the disk of the others."""
        sizes = 0
        for folder in self._attempts:
            for path in _files(folder):
                with contextlib.suppress(OSError):
                    sizes += path.stat().st_size
        return self._written + sizes


class _LostError(Exception):
    """A worker or a node is no more."""


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Keep what pack does when it is told to stop, which Ray would replace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
