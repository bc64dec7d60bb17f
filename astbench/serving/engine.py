"""One thread that owns the model: a bounded queue in front of it, and what runs together behind it.

Requests join and leave between two steps of the model, so that a short one does not wait for a long one. What a step
is, the worker says: one token of every text, one batch of windows, one batch of sentences.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from astbench.errors import AstbenchError, out_of_memory

log = logging.getLogger(__name__)

Emit = Callable[[Any], None]
"""Takes what comes of a job, from the engine's thread: an event of the worker's, :class:`Done` or an exception."""


class Done:
    """The last event of a job that went well.

    Args:
        result: What the worker says at the end.
    """

    def __init__(self, result: Any = None) -> None:
        self.result = result


class Full(Exception):
    """As many requests wait as may."""


class ShuttingDown(Exception):
    """The server stops, and takes no more."""


class NotFinite(Exception):
    """The model gave no numbers for this input."""

    def __init__(self, message: str = "the model's output is not finite") -> None:
        super().__init__(message)


class Job:
    """One request.

    Args:
        work: What is to be done, as its worker takes it.
        emit: Takes what comes of it.
    """

    def __init__(self, work: Any, emit: Emit) -> None:
        self.work = work
        self.cancelled = self.ended = False
        self._emit = emit

    def emit(self, event: Any) -> None:
        """Hand on an event, unless the job has ended."""
        if not self.ended:
            self.ended = isinstance(event, Done | Exception)
            self._emit(event)


class Worker(Protocol):
    """What the engine drives, always from its own thread.

    Attributes:
        capacity: Jobs at a time.
        at_once: Jobs that may begin between two steps; those that run wait for it.
    """

    capacity: int
    at_once: int

    @property
    def running(self) -> Sequence[Job]:
        """Jobs that were admitted and have not ended."""

    def admit(self, job: Job) -> None:
        """Begin a job; what it raises ends that job."""

    def step(self) -> None:
        """Go on with all that run; what it raises ends them all."""

    def drop(self, job: Job) -> None:
        """Forget a running job."""


class Runs(Protocol):
    """What serves jobs: an :class:`Engine`, or several of them in a :class:`astbench.serving.pool.Pool`.

    Attributes:
        queue: Jobs that may wait.
    """

    queue: int

    def start(self) -> None:
        """Begin to work, unless it has."""

    def stop(self, seconds: float = 5.0) -> None:
        """End what is left."""

    @property
    def alive(self) -> bool:
        """Whether jobs can be expected to end."""

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""

    @property
    def running(self) -> int:
        """Jobs that left the queue and have not ended."""

    def submit(self, job: Job) -> None:
        """Put a job into the queue."""

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more."""


class Engine:
    """Runs jobs in the order in which they come, `worker.capacity` at a time.

    Args:
        worker: Does the work.
        queue: Jobs that may wait.
        stepped: Told after every step how many jobs took part.
    """

    def __init__(self, worker: Worker, queue: int, stepped: Callable[[int], None] = lambda _: None) -> None:
        self.worker, self.queue = worker, queue
        self._stepped = stepped
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._busy = 0  # jobs that left the queue and have not ended
        self._thread = threading.Thread(target=self._run, name="astbench-engine", daemon=True)

    def start(self) -> None:
        """Begin to work, unless it has."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """End what is left, and the thread, if the step in which it is ends in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Whether jobs can be expected to end."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that left the queue and have not ended."""
        return self._busy

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            Full: as many wait as may, and none of those that run is free.
            ShuttingDown: the engine stops.
        """
        with self._changed:
            if self._stopping:
                raise ShuttingDown
            if len(self._waiting) >= self.queue + max(0, self.worker.capacity - self._busy):
                raise Full
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: out of the queue now, out of what runs after the step."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while (jobs := self._next()) is not None:
                for gone in [j for j in self.worker.running if j.cancelled]:
                    self.worker.drop(gone)
                for job in jobs:
                    self._guarded(partial(self.worker.admit, job), [job])
                if running := list(self.worker.running):
                    self._guarded(self.worker.step, running)
                    self._stepped(len(running))
                self._busy = len(self.worker.running)
        except BaseException:
            log.exception("the engine has ended, and serves nobody any more")
        finally:
            with self._changed:
                self._stopping = True
                left = [*self.worker.running, *self._waiting]
                self._waiting.clear()
            for job in left:
                job.emit(ShuttingDown())

    def _next(self) -> list[Job] | None:
        """Jobs to admit, none to go on with those that run; None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.worker.running or self._stopping)
            if self._stopping:
                return None
            room = min(self.worker.at_once, self.worker.capacity - len(self.worker.running), len(self._waiting))
            self._busy += room
            return [self._waiting.popleft() for _ in range(room)]

    def _guarded(self, act: Callable[[], None], jobs: list[Job]) -> None:
        """What fails ends these jobs, and nothing else."""
        try:
            act()
        except Exception as error:
            if not isinstance(error, AstbenchError | NotFinite) and not out_of_memory(error):
                log.exception("a step failed")
            for job in jobs:
                self.worker.drop(job)
                job.emit(error)
