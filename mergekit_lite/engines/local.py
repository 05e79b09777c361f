"""This process: all threads stream through all files, whose inputs are hashed as they pass."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mergekit_lite.engines.protocol import Computed, Engine, Portion, Work
from mergekit_lite.errors import Interrupted
from mergekit_lite.kernels.jit import is_first_use
from mergekit_lite.merge.stream import Job, run_jobs

if TYPE_CHECKING:
    from mergekit_lite.merge.run import Progress
    from mergekit_lite.merge.writer import ArtifactWriter

__all__ = ["LocalEngine"]


class LocalEngine(Engine):
    """Computes in this process."""

    def compute(
        self,
        work: Work,
        writers: Sequence[ArtifactWriter],
        threads: int,
        memory: int,
        progress: Progress,
    ) -> Computed:
        """Write every file that a work's writers lack."""
        if is_first_use():
            progress.note("compiling kernels, once after installation: some seconds")
        portions = [
            Portion(number, frozenset(writer.missing_tensors()), writer)
            for number, writer in enumerate(writers)
        ]

        def abort() -> None:
            for writer in writers:
                writer.abort()

        def run(jobs: Iterator[Job]) -> None:
            run_jobs(jobs, threads, work.held_bytes(memory, threads), progress.advance, abort)

        steps = work.steps()
        if steps or any(portion.names for portion in portions):
            work.observe(run, progress)
        if steps:
            run_id = uuid.uuid4().hex
            attempts = [writer.begin_attempts(run_id) for writer in writers]
            with _stoppable():
                work.do(steps, attempts, threads, progress)
        if any(portion.names for portion in portions):
            progress.begin(work.title, work.job_bytes(portions))
            run(work.jobs(portions))
        progress.begin("Check inputs", 0)
        weights = {reference: work.input_files(reference) for reference in work.references}
        return Computed(weights, work.check([writer.partial for writer in writers], progress))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn Ctrl-C into what says that the same command continues."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("stopped") from None
