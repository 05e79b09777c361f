"""Runs the work of many tensors on all cores, in order, within a memory budget.

The work of a tensor is a job: some passes in which every chunk is observed, then one in which every
chunk is read. Threads always take the earliest piece of work there is; a later tensor is begun only
when nothing of the earlier ones can be done. So reading, computing, hashing and writing of
neighbouring tensors overlap, and no more tensors are held than the threads need.
"""

from __future__ import annotations

import heapq
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from mergekit_lite import collector
from mergekit_lite.checkpoint.far.fetcher import FETCHER
from mergekit_lite.checkpoint.protocol import CHUNK_ELEMENTS, Rows, TensorReader
from mergekit_lite.errors import Interrupted

__all__ = ["Job", "run_jobs"]


class Job(ABC):
    """The work of one tensor."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        self.chunks: Sequence[Rows] = list(reader.spec.chunks(CHUNK_ELEMENTS))
        self.held = 0

    @abstractmethod
    def finish(self, rows: Rows) -> None:
        """Do the last pass over one chunk."""

    @abstractmethod
    def done(self) -> None:
        """Every chunk is finished."""

    def input_bytes(self, rows: Rows) -> int:
        """Bytes of work that one chunk of the last pass stands for, for the progress shown."""
        return rows.size * self.reader.spec.columns * self.reader.spec.dtype.itemsize


class _Scheduler:
    def __init__(
        self,
        jobs: Iterator[Job],
        memory: int,
        progress: Callable[[int], None],
        abort: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._abort = abort
        self._memory = memory
        self._progress = progress
        self._held = 0
        self._flying = 0
        self._begun = 0
        self._coming: Job | None = None
        self._ready: list[tuple[int, int, int, Job]] = []
        self._left: dict[int, int] = {}
        self._changed = threading.Condition()
        self.failure: BaseException | None = None

    def work(self) -> None:
        """Run pieces of work until there are none, or something fails."""
        try:
            while True:
                piece = self._next()
                if piece is None:
                    return
                self._run(*piece)
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Let every thread end after its present piece."""
        with self._changed:
            if self.failure is None:
                self.failure = error
            self._changed.notify_all()
        FETCHER.stop()
        self._abort()

    def _next(self) -> tuple[int, int, int, Job] | None:
        with self._changed:
            while self.failure is None:
                if self._ready:
                    return heapq.heappop(self._ready)
                if self._coming is None:
                    self._coming = next(self._jobs, None)
                if self._coming is not None and self._fits(self._coming):
                    self._begin(self._coming)
                    self._coming = None
                elif self._coming is None and self._flying == 0:
                    self._changed.notify_all()
                    return None
                else:
                    self._changed.wait()
            return None

    def _fits(self, job: Job) -> bool:
        """Whether a job may be begun; one that comes over a network waits until it can be kept."""
        if self._flying == 0:
            return True
        dear = job.reader.far and job.reader.passes > 0
        return self._held + (job.reader.resident_bytes() if dear else 0) < self._memory

    def _begin(self, job: Job) -> None:
        number = self._begun
        self._begun += 1
        resident = job.reader.resident_bytes() if job.reader.passes else 0
        if resident and (resident <= self._memory - self._held or job.reader.far):
            job.reader.keep()
            job.held = resident
        self._held += job.held
        self._flying += 1
        self._push(number, 0, job)

    def _push(self, number: int, phase: int, job: Job) -> None:
        if not job.chunks:
            job.reader.close()
            job.done()
            self._end(number, job)
            return
        self._left[number] = len(job.chunks)
        for at in range(len(job.chunks)):
            heapq.heappush(self._ready, (number, phase, at, job))
        self._changed.notify_all()

    def _end(self, number: int, job: Job) -> None:
        self._left.pop(number, None)
        self._held -= job.held
        self._flying -= 1
        self._changed.notify_all()

    def _run(self, number: int, phase: int, at: int, job: Job) -> None:
        rows = job.chunks[at]
        last = phase == job.reader.passes
        if last:
            job.finish(rows)
        else:
            job.reader.observe(phase, rows)
        with self._changed:
            if last:
                self._progress(job.input_bytes(rows))
            self._left[number] -= 1
            if self._left[number]:
                return
        if last:
            job.reader.close()
            job.done()
        else:
            job.reader.settle(phase)
        with self._changed:
            if last:
                self._end(number, job)
            else:
                self._push(number, phase + 1, job)


def run_jobs(
    jobs: Iterator[Job],
    threads: int,
    memory: int,
    progress: Callable[[int], None],
    abort: Callable[[], None] = lambda: None,
) -> None:
    """Run jobs on several threads.

    Args:
        jobs: In the order in which they should be done; taken one by one as they are begun.
        threads: How many threads work.
        memory: Bytes that may be held between the passes of all tensors that are under way.
        progress: Told the bytes of every finished chunk; called under a lock.
        abort: Called when the run fails or is stopped; wakes whoever waits outside the scheduler.

    Raises:
        Interrupted: The user pressed Ctrl-C; the pieces under way have ended.
    """
    collector.resume()
    scheduler = _Scheduler(jobs, memory, progress, abort)
    workers = [
        threading.Thread(target=scheduler.work, name=f"pack-{i}", daemon=True)
        for i in range(threads)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)
    except KeyboardInterrupt:
        scheduler.stop(Interrupted("stopped"))
        for worker in workers:
            worker.join()
    finally:
        FETCHER.stopping = False
    if scheduler.failure is not None:
        raise scheduler.failure
