"""The model in several processes behind one queue. A process that dies is replaced, and its requests begin again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from astbench.errors import ConfigError
from astbench.serving.engine import Done, Full, Job, ShuttingDown, Worker
from astbench.serving.process import Ready, Stepped, work_off

log = logging.getLogger(__name__)

TRIES = 2
"""Processes that may die of one job; then the job has failed."""

STARTS = 3
"""Processes in a row that may end before their model is loaded; then no more are started in this place."""


class Lost(Exception):
    """Every process that had this job died."""


@dataclass(eq=False)
class _Task:
    """A job, with what a second process has to know of it.

    Attributes:
        job: Where its events go.
        sent: Events that went there.
        again: Events that the present process gives a second time, and that nobody waits for.
        tries: Processes that had it.
    """

    job: Job
    sent: int = 0
    again: int = 0
    tries: int = 0


@dataclass(eq=False)
class _Place:
    """A process, and the one that comes after it.

    Attributes:
        number: From 0.
        process: What runs.
        pipe: To it.
        ready: Its model is loaded.
        tasks: What it works on.
        failures: Processes of this place that ended before they were ready, since one was.
        gpu_peak: Most bytes of a GPU that it had.
    """

    number: int
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    tasks: dict[int, _Task] = field(default_factory=dict)
    failures: int = 0
    gpu_peak: int = 0


class Pool:
    """Like :class:`astbench.serving.engine.Engine`, with several processes instead of one thread.

    A job goes to the process with the fewest. When a process dies, another one does its jobs from the beginning, and
    events that were sent already are not sent again: a job gives the same events each time, but for a tie of two
    tokens (see docs/serve.md).

    Args:
        make: Loads the model of the process with this number, in that process; pickled on the way.
        count: Processes.
        capacity: Jobs at a time of each.
        queue: Jobs that may wait.
        stepped: Told after every step of a process how many jobs took part.
    """

    def __init__(
        self,
        make: Callable[[int], Worker],
        count: int,
        capacity: int,
        queue: int,
        stepped: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.queue = queue
        self._make, self._capacity, self._stepped = make, capacity, stepped
        self._context = multiprocessing.get_context("spawn")
        self._changed = threading.Condition()
        self._waiting: deque[_Task] = deque()
        self._places: list[_Place | None] = [None] * count
        self._numbers = iter(range(2**63))
        self._started = self._stopping = False

    def start(self) -> None:
        """Start the processes, and wait until every one has loaded the model.

        Raises:
            ConfigError: one could not; it has said why.
        """
        with self._changed:
            if self._started:
                return
            self._started = True
            os.environ.setdefault("TQDM_DISABLE", "1")  # the weights were loaded here, and said so once
            for number in range(len(self._places)):
                self._begin(number, failures=STARTS - 1)
            self._changed.wait_for(lambda: not all(self._places) or all(place.ready for place in self._places if place))
            failed = not all(self._places)
        if failed:
            self.stop(0)
            raise ConfigError("a process of --workers ended before it had loaded the model; its lines above say why")

    def stop(self, seconds: float = 5.0) -> None:
        """End what is left, and the processes."""
        with self._changed:
            self._stopping = True
            places = [place for place in self._places if place]
            left = [*(task for place in places for task in place.tasks.values()), *self._waiting]
            self._waiting.clear()
            for place in places:
                place.tasks.clear()
                self._tell(place, None, None)
        for task in left:
            task.job.emit(ShuttingDown())
        end = time.monotonic() + max(seconds, 1.0)
        for place in places:
            place.process.join(max(0.0, end - time.monotonic()))
            if place.process.is_alive():
                place.process.kill()
                place.process.join()
        self._places = [None] * len(self._places)

    @property
    def alive(self) -> bool:
        """Whether jobs can be expected to end."""
        return self._started and not self._stopping and any(self._places)

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that a process works on."""
        return sum(len(place.tasks) for place in self._places if place)

    @property
    def pids(self) -> list[int]:
        """Of the processes that live."""
        return [place.process.pid for place in self._places if place and place.process.pid is not None]

    @property
    def gpu_peak(self) -> int:
        """Most bytes of GPUs that the processes had, together."""
        return sum(place.gpu_peak for place in self._places if place)

    def submit(self, job: Job) -> None:
        """See :meth:`astbench.serving.engine.Engine.submit`."""
        with self._changed:
            if not self.alive:
                raise ShuttingDown
            if len(self._waiting) >= self.queue + sum(self._room(place) for place in self._places):
                raise Full
            self._waiting.append(_Task(job))
            self._hand_out()

    def cancel(self, job: Job) -> None:
        """See :meth:`astbench.serving.engine.Engine.cancel`."""
        with self._changed:
            job.cancelled = True
            self._waiting = deque(task for task in self._waiting if task.job is not job)
            for place in self._places:
                for number in [n for n, task in place.tasks.items() if task.job is job] if place else ():
                    assert place is not None
                    del place.tasks[number]
                    self._tell(place, number, None)
            self._hand_out()

    def _room(self, place: _Place | None) -> int:
        return max(0, self._capacity - len(place.tasks)) if place is not None and place.ready else 0

    def _tell(self, place: _Place, number: int | None, work: Any) -> None:
        """Send to a process. If it is gone, its listener sees it, too, and gives its tasks to others."""
        try:
            place.pipe.send((number, work))
        except OSError:
            place.ready = False

    def _hand_out(self) -> None:
        """Give what waits to those who have room."""
        while self._waiting and (free := [place for place in self._places if place and self._room(place)]):
            place = min(free, key=lambda place: len(place.tasks))
            task, number = self._waiting.popleft(), next(self._numbers)
            task.again, task.tries = task.sent, task.tries + 1
            place.tasks[number] = task
            self._tell(place, number, task.job.work)
        self._changed.notify_all()

    def _begin(self, number: int, failures: int) -> None:
        """Start a process in this place."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work_off, args=(partial(self._make, number), theirs), name=f"astbench-worker-{number}", daemon=True
        )
        process.start()
        theirs.close()
        place = _Place(number, process, ours, failures=failures)
        self._places[number] = place
        threading.Thread(target=self._listen, args=(place,), name=f"astbench-listen-{number}", daemon=True).start()

    def _listen(self, place: _Place) -> None:
        """Hand on what a process sends, until it is gone."""
        try:
            while True:
                number, event = place.pipe.recv()
                if number is None:
                    self._own(place, event)
                else:
                    self._hand_on(place, number, event)
        except (EOFError, OSError):
            self._replace(place)

    def _own(self, place: _Place, event: Ready | Stepped) -> None:
        if isinstance(event, Stepped):
            place.gpu_peak = event.gpu_peak
            self._stepped(event.jobs)
            return
        with self._changed:
            place.ready, place.failures = True, 0
            self._hand_out()

    def _hand_on(self, place: _Place, number: int, event: Any) -> None:
        with self._changed:
            task = place.tasks.get(number)
            if task is None:
                return  # nobody waits for it any more
            if isinstance(event, Done | Exception):
                del place.tasks[number]
                self._hand_out()
            elif task.again:
                task.again -= 1
                return
            else:
                task.sent += 1
        task.job.emit(event)

    def _replace(self, place: _Place) -> None:
        """A process is gone: another one begins, and its jobs are the next ones."""
        place.process.join()
        with self._changed:
            if self._stopping:
                return
            tasks = sorted(place.tasks.items())
            failures = 0 if place.ready else place.failures + 1
            place.ready = False
            log.error("process %s ended with %s", place.process.name, place.process.exitcode)
            if failures < STARTS:
                self._begin(place.number, failures)
            else:
                log.error("no further process is started in its place")
                self._places[place.number] = None
            lost = [task for _, task in tasks if task.tries >= TRIES or not any(self._places)]
            self._waiting.extendleft(task for _, task in reversed(tasks) if task not in lost)
            if not any(self._places):
                lost += self._waiting
                self._waiting.clear()
            self._hand_out()
        for task in lost:
            task.job.emit(Lost())
