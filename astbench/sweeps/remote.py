"""A cell that somebody else's worker runs: what travels there, and what it does. Imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astbench.sweeps import local
from astbench.sweeps.launcher import PATIENCE, last_words
from astbench.sweeps.spec import Cell
from astbench.sweeps.states import DONE, RUNNING, look, words_to_start

Outcome = tuple[int, float, str]
"""Exit code, seconds, last words."""

_LOOK = 0.5


@dataclass
class Errand:
    """Runs a cell as far as it is not done; called again after a worker was lost, it goes on.

    Attributes:
        cell: What to run; its folder must be the same one from everywhere.
        plugins: Code that the cell loads.
        log: For what it prints.
        place: Folder that paths start from.
        child: What starts a cell.
    """

    cell: Cell
    plugins: tuple[str, ...]
    log: Path
    place: Path
    child: tuple[str, ...] = field(default_factory=lambda: local.CHILD)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}

    def __call__(self) -> Outcome:
        """Run it; whatever ends this call ends the cell too, which saves first."""
        os.chdir(self.place)
        began = time.monotonic()
        end = began + PATIENCE
        while (state := look(self.cell).state) == RUNNING and time.monotonic() < end:
            time.sleep(_LOOK)  # the child of a worker that was lost is saving
        if state == DONE:
            return 0, 0.0, ""
        self._process = local.start(words_to_start(self.cell, self.plugins), self.log, dict(os.environ), self.child)
        try:
            while (code := self._process.poll()) is None:
                time.sleep(_LOOK)  # Ray cancels by an interrupt that ends no wait
        finally:
            if self._process.poll() is None:
                local.stop([self._process])
        return code, time.monotonic() - began, last_words(self.log)

    def checkpoint(self) -> Any:
        """What submitit calls when a job's time is over or its place is wanted: save, and queue again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            local.stop([self._process])
        return DelayedSubmission(Errand(self.cell, self.plugins, self.log, self.place, self.child))
