"""Numbers as cells. Imports nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean


def thousands(number: int) -> str:
    """`98,568`."""
    return f"{number:,}"


def mean(numbers: Iterable[float], digits: int = 1) -> str:
    """The mean, with so many digits after the point."""
    return f"{fmean(numbers):.{digits}f}"


def spread(numbers: Sequence[float], digits: int = 1) -> str:
    """How many seeds, and the lowest and highest of several."""
    if len(numbers) == 1:
        return "1"
    return f"{len(numbers)} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def exponent(found: float | None) -> str:
    """The exponent of a growth; `-` where too few lengths were measured."""
    return "-" if found is None else f"{found:.2f}"
