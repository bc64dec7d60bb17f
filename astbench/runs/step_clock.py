"""How long optimizer steps take, whole ones, of however many batches."""

from __future__ import annotations

import time
from typing import Any

import torch


class StepClock:
    """Times steps by their numbers.

    Attributes:
        step: The step that runs, or ran last; -1 before any.
    """

    def __init__(self) -> None:
        self.step = -1
        self._seconds: list[float] = []
        self._started = 0.0

    def start(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self._started = time.perf_counter()

    def stop(self, step: int) -> None:
        """A batch is done; `step` steps are, by now, which tells whether it ended one."""
        if step != self.step:
            self._seconds.append(time.perf_counter() - self._started)

    def summary(self) -> dict[str, Any]:
        """Lower quartile, median and upper quartile in milliseconds (None of fewer than 4 steps), and of how many."""
        quartiles = None
        if len(self._seconds) >= 4:
            values = torch.tensor(self._seconds, dtype=torch.float64)
            parts = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
            quartiles = [round(1000 * part, 3) for part in parts.tolist()]
        return {"step_ms": quartiles, "steps_timed": len(self._seconds)}
