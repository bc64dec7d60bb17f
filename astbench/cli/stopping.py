"""SIGTERM and Ctrl-C: at once, but while training at the end of the step, so that a checkpoint can be written.

A library may swallow what a signal's handler raises, or make something else of it. So a signal is remembered too, and
looked for at the next place that a run passes. Imports nothing heavy.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from astbench.errors import Interrupted, Stopped, Terminated

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """The signals that ask this process to stop.

    Attributes:
        number: The first that came; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._waits = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a signal is remembered and stops the process."""
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        self.number = None
        self.release()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hold(self) -> None:
        """From here on signals wait until somebody asks."""
        self.check()
        self._waits = True
        self._take()

    def release(self) -> None:
        """From here on they stop the run at once."""
        self._waits = False
        self._take()

    def check(self) -> None:
        """Stop if a signal came that somebody swallowed.

        Raises:
            Stopped: one came.
        """
        if self.number is not None:
            raise self.error()

    def came(self, trainer: pl.Trainer) -> bool:
        """Whether one reached any of the run's processes: all must save, and stop, at the same step."""
        stop = self.number is not None
        return trainer.strategy.reduce_boolean_decision(stop, all=False) if trainer.world_size > 1 else stop

    def error(self, how: str = "") -> Stopped:
        """What to raise; `how` says at which step, and how to go on."""
        if self.number == signal.SIGINT:
            return Interrupted(f"interrupted{how}")
        return Terminated(f"terminated by SIGTERM{how}")

    def _take(self) -> None:
        """Lightning puts handlers of its own in front of these."""
        for number in _NUMBERS:
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, *_: Any) -> None:
        again = self.number is not None
        self.number = self.number or number
        if not self._waits or (again and number == signal.SIGINT):  # a second Ctrl-C does not wait
            raise self.error()


SIGNALS = StopSignals()
"""Of this process."""
