"""Work that is done in parts, one worker at a time: each goes on until it pauses or ends.

A model's forward cannot be left in the middle and entered again, a thread in it can wait. So every
batch gets a thread that waits where the next matrix is wanted, and only one of them ever runs.
What takes time is handed back to the thread that directs: libraries that compute in parallel keep
threads and memory for every thread that calls them, and are slow where many do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Lockstep"]


class _Stopped(BaseException):
    """Raised in a worker that waits while all are ended."""


class _Worker:
    def __init__(self, work: Callable[[], None], place: threading.local) -> None:
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._stop = False
        self._asked: Callable[[], Any] | None = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._work = work
        self._place = place
        self.ended = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._place.worker = self
        self._go.acquire()
        try:
            if not self._stop:
                self._work()
        except _Stopped:
            pass
        except BaseException as error:
            self.failure = error
        self.ended = True
        self._back.release()

    def step(self) -> None:
        """Run until the worker pauses or ends; from the thread that directs."""
        self._go.release()
        self._back.acquire()
        while self._asked is not None:
            asked, self._asked = self._asked, None
            try:
                self._answer = asked()
            except BaseException as error:
                self._error = error
            self._go.release()
            self._back.acquire()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def pause(self) -> None:
        """Wait for the next step; from the worker's own thread."""
        self._back.release()
        self._go.acquire()
        if self._stop:
            raise _Stopped

    def ask(self, work: Callable[[], Any]) -> Any:
        """Have something done by the thread that directs."""
        self._asked = work
        self.pause()
        answer, self._answer = self._answer, None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return answer

    def stop(self) -> None:
        """End it where it waits."""
        self._stop = True
        self._go.release()
        self._thread.join()


class Lockstep:
    """Several workers that are led step by step.

    Args:
        works: What each does; it may call `pause`.
    """

    def __init__(self, works: Sequence[Callable[[], None]]) -> None:
        self._place = threading.local()
        self._workers = [_Worker(work, self._place) for work in works]

    def pause(self) -> None:
        """Wait until all others have come as far; to be called by a worker."""
        worker: _Worker = self._place.worker
        worker.pause()

    def ask(self, work: Callable[[], Any]) -> Any:
        """Have something done by the thread that directs; to be called by a worker."""
        worker: _Worker = self._place.worker
        return worker.ask(work)

    def step(self) -> bool:
        """Lead each worker to its next pause or its end.

        Returns:
            Whether some have not ended.

        Raises:
            BaseException: What a worker raised.
        """
        for worker in self._workers:
            if not worker.ended:
                worker.step()
        return any(not worker.ended for worker in self._workers)

    def close(self) -> None:
        """End all that wait."""
        for worker in self._workers:
            if not worker.ended:
                worker.stop()
