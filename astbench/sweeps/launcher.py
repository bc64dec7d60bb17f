"""What launchers share: so many cells at a time, each told as it ends, none left behind."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench.errors import ConfigError
from astbench.sweeps.spec import Cell

PATIENCE = 120.0
"""Seconds that stopped cells have for their checkpoints."""

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


class Launcher(ABC):
    """Starts cells and waits for them.

    Args:
        jobs: Most cells at a time.
        logs: Folder for what each cell prints.

    Attributes:
        stopped: Cells that were asked to stop, since this process was.
    """

    def __init__(self, jobs: int, logs: Path) -> None:
        self._jobs, self._logs = jobs, logs
        self._running: list[Any] = []
        self.stopped: list[Ended] = []

    @abstractmethod
    def _start(self, cell: Cell, words: list[str]) -> Any:
        """Start a cell; what :meth:`_ended` and :meth:`_stop` take."""

    @abstractmethod
    def _ended(self, one: Any) -> Ended | None:
        """How a cell ended; None while it runs."""

    @abstractmethod
    def _stop(self, running: Sequence[Any]) -> list[Ended]:
        """Ask all of these to save and stop, and wait until they have."""

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
                    self._running.append(self._start(cell, typed))
                for one in list(self._running):
                    ended = self._ended(one)
                    if ended is not None:
                        self._running.remove(one)
                        yield ended
                time.sleep(_LOOK)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """However this process goes on, no cell runs on by itself."""
        try:
            yield
        finally:
            self.stopped += self._stop(self._running)
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
