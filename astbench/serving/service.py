"""Between HTTP and the engine: one request's events, its time, and what happens when its client leaves."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.types import Receive

from astbench.serving.engine import Done, Full, Job, Runs
from astbench.serving.front import Gone
from astbench.serving.loading import Served
from astbench.serving.metrics import Metrics
from astbench.serving.options import ServeOptions
from astbench.serving.refusals import Refused

Made = TypeVar("Made")


class Service:
    """What the routes share.

    Args:
        served: The model.
        engine: Runs it.
        options: The limits.
        metrics: Told of what happens.

    Attributes:
        draining: The server was asked to stop: requests that are here are served, new ones are not.
    """

    def __init__(self, served: Served, engine: Runs, options: ServeOptions, metrics: Metrics) -> None:
        self.served, self.options, self.metrics = served, options, metrics
        self.engine = engine
        self.draining = False
        self._each = 0.5  # seconds that a request takes in the engine, on average
        # One thread: a tokenizer that is told how to cut must not be used meanwhile.
        self._texts = ThreadPoolExecutor(1, "astbench-text")
        metrics.watch(self.engine)

    @property
    def limit(self) -> int:
        """Most tokens of a prompt and what is written to it."""
        asked = self.options.max_length
        return self.served.limit if asked is None else min(asked, self.served.limit)

    @property
    def ready(self) -> bool:
        """New requests are taken."""
        return self.engine.alive and not self.draining

    def start(self) -> None:
        """Begin to serve."""
        self.engine.start()

    def stop(self) -> None:
        """End whatever is left."""
        self.engine.stop()
        self._texts.shutdown(wait=False, cancel_futures=True)

    def refuse_early(self, here: int) -> None:
        """Before a body is read, with so many requests here, this one among them.

        Raises:
            Refused: the server stops, or far more requests are here than can wait.
        """
        if self.draining:
            raise Refused(503, "the server is shutting down", headers={"retry-after": "5", "connection": "close"})
        if not self.engine.alive:
            raise Refused(503, "the model has stopped; the server's log says why")
        if here > 2 * (self.options.queue + self.options.together) + 16:
            raise self._full()

    async def text(self, make: Callable[[], Made], deadline: float) -> Made:
        """Something with the tokenizer, outside of the event loop.

        Raises:
            TimeoutError: too late.
        """
        async with asyncio.timeout_at(deadline):
            return await asyncio.get_running_loop().run_in_executor(self._texts, make)

    def deadline(self) -> float:
        """When a request that begins now has to be done, in the event loop's time."""
        return asyncio.get_running_loop().time() + self.options.timeout

    @asynccontextmanager
    async def events(self, work: Any, receive: Receive, deadline: float) -> AsyncIterator[Callable[[], Any]]:
        """Run a job; gives `next_event()`, whose last one is :class:`Done`. Left early, the job is cancelled.

        Raises:
            Refused: as many wait as may.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def emit(event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody is there
                loop.call_soon_threadsafe(queue.put_nowait, event)

        async def next_event() -> Any:
            async with asyncio.timeout_at(deadline):
                event = await queue.get()
            if isinstance(event, Exception):
                raise event
            return event

        job = Job(work, emit)
        try:
            self.engine.submit(job)
        except Full:
            raise self._full() from None
        watch = asyncio.create_task(_tell_when_gone(receive, queue))
        began = time.perf_counter()
        try:
            yield next_event
        finally:
            watch.cancel()
            self.engine.cancel(job)
            if job.ended:
                self._each += 0.1 * (time.perf_counter() - began - self._each)

    async def result(self, work: Any, receive: Receive, deadline: float) -> Any:
        """Run a job that has one event only."""
        async with self.events(work, receive, deadline) as next_event:
            event = await next_event()
        assert isinstance(event, Done)
        return event.result

    def _full(self) -> Refused:
        waiting = min(self.engine.waiting, self.options.queue)  # the rest is about to begin
        turns = (waiting + 1) / self.options.together
        seconds = min(60, max(1, math.ceil(turns * self._each)))
        return Refused(
            429,
            f"{waiting} request{'s'[: waiting != 1]} wait{'s'[: waiting == 1]} already; try again in {seconds} s",
            headers={"retry-after": str(seconds)},
        )


async def _tell_when_gone(receive: Receive, queue: asyncio.Queue[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    queue.put_nowait(Gone())
