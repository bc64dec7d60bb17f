"""One process of several with the same model: takes jobs from a pipe, and sends back what comes of them."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from astbench.errors import AstbenchError, out_of_memory
from astbench.serving.engine import Engine, Job, ShuttingDown, Worker

log = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds after which a process without new jobs looks whether its engine is well."""


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""


@dataclass(frozen=True)
class Stepped:
    """The model took a step.

    Attributes:
        jobs: That took part.
        gpu_peak: Most bytes of a GPU that this process had so far; 0 without one.
    """

    jobs: int
    gpu_peak: int


def work_off(make: Callable[[], Worker], pipe: Connection) -> None:
    """`(number, work)` begins a job, `(number, None)` ends it, `(None, None)` and a closed pipe end the process.

    Sends `(number, event)` for each event of a job, and `(None, Ready)` and `(None, Stepped)` of its own. Signals to
    the group are for the process that has the queue, which says when to stop; when that one dies, this one ends.

    Args:
        make: Loads the model.
        pipe: To the process that has the queue.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    tqdm.set_lock(threading.RLock())  # its own is one between processes, of which a killed one would leave something
    sending = threading.Lock()

    def send(number: int | None, event: Any) -> None:
        if isinstance(event, ShuttingDown):
            return  # whoever has the queue lets another process do it
        if isinstance(event, Exception):
            event = _sendable(event)
        with sending, suppress(OSError):
            pipe.send((number, event))

    try:
        worker = make()
    except AstbenchError as error:
        log.error("%s", " ".join(str(error).split()))
        os._exit(1)
    # What was cancelled may still be in the step that others wait for.
    engine = Engine(worker, 2 * worker.capacity, lambda jobs: send(None, Stepped(jobs, _gpu_peak())))
    engine.start()
    send(None, Ready())
    jobs: dict[int, Job] = {}
    with suppress(EOFError, OSError):
        while engine.alive:
            if not pipe.poll(LOOK):
                continue
            number, work = pipe.recv()
            if number is None:
                break
            if work is None:
                if (job := jobs.pop(number, None)) is not None:
                    engine.cancel(job)
                continue
            jobs = {other: job for other, job in jobs.items() if not job.ended}
            jobs[number] = Job(work, partial(send, number))
            engine.submit(jobs[number])
    logging.shutdown()
    os._exit(0 if engine.alive else 1)  # a step may take long, and nobody waits for it


def _sendable(error: Exception) -> Exception:
    """The error as another process can read it."""
    with suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return MemoryError(str(error)) if out_of_memory(error) else RuntimeError(f"{type(error).__name__}: {error}")


def _gpu_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
