"""Cells as processes of this machine: so many at a time, GPUs and cores shared out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from astbench.errors import ConfigError
from astbench.sweeps.spec import Cell

PATIENCE = 120.0
"""Seconds that stopped cells have for their checkpoints."""

CHILD = (sys.executable, "-m", "astbench.sweeps.child")
"""What starts a cell; behind it come this process's number and the cell's words."""

_LOOK = 0.1


@dataclass(frozen=True)
class Ended:
    """A cell's process that is gone.

    Attributes:
        code: Its exit code; negative, the signal that ended it.
        seconds: How long it ran.
        said: The last line of its log that tells an error; its last line without one.
    """

    cell: Cell
    code: int
    seconds: float
    said: str


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    began: float
    slot: int
    log: Path


class Local:
    """Starts cells and waits for them.

    Args:
        jobs: Most processes at a time.
        gpus: Names of the devices to share out, as CUDA_VISIBLE_DEVICES takes them; none where there are none.
        logs: Folder for what each cell prints.

    Attributes:
        stopped: Cells that were asked to stop, since this process was.
    """

    def __init__(self, jobs: int, gpus: Sequence[str], logs: Path) -> None:
        self._jobs, self._gpus, self._logs = jobs, gpus, logs
        self._running: list[_Running] = []
        self.stopped: list[Ended] = []

    def run(self, cells: Sequence[Cell], words: Callable[[Cell], list[str]]) -> Iterator[Ended]:
        """Run all; each as it ends.

        Args:
            cells: In the order in which they start.
            words: What to type for a cell; called when its turn has come. A ConfigError of it ends that cell alone.

        Raises:
            Stopped: this process was asked to stop; the cells that ran were, too, and had time to save.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        waiting = list(cells)
        with self._stopping():
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    cell = waiting.pop(0)
                    try:
                        typed = words(cell)
                    except ConfigError as error:
                        yield Ended(cell, error.exit_code, 0.0, str(error))
                        continue
                    self._start(cell, typed)
                yield from self._gone()
                time.sleep(_LOOK)

    def _start(self, cell: Cell, words: list[str]) -> None:
        slot = min(set(range(self._jobs)) - {one.slot for one in self._running})
        log = self._logs / f"{cell.name}.log"
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [*CHILD, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment(slot),
                start_new_session=True,  # a Ctrl-C comes to the sweep, which asks its cells itself
            )
        self._running.append(_Running(cell, process, time.monotonic(), slot, log))

    def _environment(self, slot: int) -> dict[str, str]:
        env = dict(os.environ)
        if self._jobs > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._jobs)))
            if self._gpus:
                env["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return env

    def _gone(self) -> Iterator[Ended]:
        for one in list(self._running):
            code = one.process.poll()
            if code is not None:
                self._running.remove(one)
                yield Ended(one.cell, code, time.monotonic() - one.began, last_words(one.log))

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """However this process goes on, no cell runs on by itself."""
        try:
            yield
        finally:
            for one in self._running:
                one.process.terminate()
            end = time.monotonic() + PATIENCE
            for one in self._running:
                try:
                    one.process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()
                spent = time.monotonic() - one.began
                self.stopped.append(Ended(one.cell, one.process.returncode, spent, last_words(one.log)))
            self._running.clear()


def last_words(log: Path) -> str:
    """The last line of a log that tells an error, or its last line at all."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("astbench: error: ")]
    return (errors or lines or [""])[-1].removeprefix("astbench: error: ")[:500]
