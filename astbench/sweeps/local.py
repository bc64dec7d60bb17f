"""Cells as processes of this machine: so many at a time, GPUs and cores shared out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from astbench.sweeps.launcher import PATIENCE, Ended, Launcher, last_words
from astbench.sweeps.spec import Cell

CHILD = (sys.executable, "-m", "astbench.sweeps.child")
"""What starts a cell; behind it come this process's number and the cell's words."""


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    began: float
    slot: int
    log: Path

    def ended(self) -> Ended:
        return Ended(self.cell, self.process.returncode, time.monotonic() - self.began, last_words(self.log))


class Local(Launcher):
    """See the base class.

    Args:
        jobs: Most processes at a time.
        gpus: Names of the devices to share out, as CUDA_VISIBLE_DEVICES takes them; none where there are none.
        logs: Folder for what each cell prints.
    """

    _running: list[_Running]

    def __init__(self, jobs: int, gpus: Sequence[str], logs: Path) -> None:
        super().__init__(jobs, logs)
        self._gpus = gpus

    def _start(self, cell: Cell, words: list[str]) -> _Running:
        slot = min(set(range(self._jobs)) - {one.slot for one in self._running})
        log = self._logs / f"{cell.name}.log"
        process = start(words, log, self._environment(slot), CHILD)
        return _Running(cell, process, time.monotonic(), slot, log)

    def _environment(self, slot: int) -> dict[str, str]:
        env = dict(os.environ)
        if self._jobs > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._jobs)))
            if self._gpus:
                env["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return env

    def _ended(self, one: _Running) -> Ended | None:
        return None if one.process.poll() is None else one.ended()

    def _stop(self, running: Sequence[_Running]) -> list[Ended]:
        stop([one.process for one in running])
        return [one.ended() for one in running]


def start(words: Sequence[str], log: Path, env: dict[str, str], child: Sequence[str]) -> subprocess.Popen[bytes]:
    """A cell's process, a child of this one; what it prints goes behind what the log holds."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            [*child, str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=env,
            start_new_session=True,  # a Ctrl-C comes to the sweep, which asks its cells itself
        )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to save and end; after some patience, end them."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
