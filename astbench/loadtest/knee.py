"""Up to which rate a server keeps what it promises. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Knee:
    """The highest rate up to which the share of good answers stays.

    Attributes:
        rate: Requests a second; None where not even the lowest rate tried was held.
        passed: Whether a higher rate was tried, at which it did not stay.
    """

    rate: float | None
    passed: bool

    def said(self, digits: int = 3) -> str:
        """In words, the rate in so many digits."""
        if self.rate is None:
            return "below the lowest rate tried"
        return f"{self.rate:.{digits}g}" if self.passed else f"at least {self.rate:.{digits}g}, no higher rate tried"


def knee(points: Sequence[tuple[float, float]], share: float) -> Knee:
    """The knee of a curve: rates above one at which the share was not held do not count, whatever was measured there.

    Args:
        points: Requests a second and the share of them that was answered well, in any order.
        share: That has to stay.
    """
    held: float | None = None
    for rate, good in sorted(points):
        if good < share:
            return Knee(held, True)
        held = rate
    return Knee(held, False)
