"""Numbers as cells. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from astbench.bench import analysis


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


def crossover(benched: list[analysis.Cell], name: str, mode: str) -> str:
    """From which length on a layer is faster than the fastest dense one; in words where there is no such length."""
    found = analysis.crossover(benched, name, mode)
    if found is not None:
        return f"{found:,.0f}"
    faster = [times > 1 for times in analysis.speedup(benched, name, mode).values()]
    if not faster:
        return ""
    return "every length" if all(faster) else "now and then" if any(faster) else "never"


def losing(benched: list[analysis.Cell], name: str, mode: str) -> str:
    """Measured lengths at which a layer is no faster than the fastest dense one."""
    found = analysis.speedup(benched, name, mode)
    lengths = sorted(length for length, times in found.items() if times <= 1)
    return ", ".join(f"{length:,}" for length in lengths) or ("none" if found else "")
