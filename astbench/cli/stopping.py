"""SIGTERM and Ctrl-C while training: they wait for the end of the step, so that a checkpoint can be written."""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl

from astbench.errors import Interrupted, Stopped, Terminated


class StopSignals:
    """Remembers a signal until somebody asks."""

    def __init__(self) -> None:
        self._number: int | None = None

    def hold(self) -> None:
        """From here on signals wait."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def release(self) -> None:
        """From here on they stop the run at once again."""
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, *_: Any) -> None:
        self._number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def came(self, trainer: pl.Trainer) -> bool:
        """Whether one reached any of the run's processes: all must save, and stop, at the same step."""
        stop = self._number is not None
        return trainer.strategy.reduce_boolean_decision(stop, all=False) if trainer.world_size > 1 else stop

    def error(self, step: int, go_on: str) -> Stopped:
        """What to raise after `step` steps; `go_on` are the options that continue the run."""
        how = f"at step {step}; continue with {go_on}"
        if self._number == signal.SIGINT:
            return Interrupted(f"interrupted {how}")
        return Terminated(f"terminated by SIGTERM {how}")


def _terminate(*_: Any) -> None:
    raise Terminated("terminated by SIGTERM")
