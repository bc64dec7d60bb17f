"""Student's interval and test of a mean, for few values. Plain Python: no table needs a package for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def interval(
    values: Sequence[float], confidence: float = 0.95, *, weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Two-sided interval of the mean of independent values.

    Args:
        values: At least two.
        confidence: Of the interval.
        weights: Of a weighted mean, a ratio of two sums: its interval is that of the linearised ratio. All alike if not
            given.

    Raises:
        ValueError: fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval needs two values or more, got {count}")
    middle = statistics.fmean(values, weights)
    if weights is not None:
        scale = count / sum(weights)
        values = [middle + scale * weight * (value - middle) for value, weight in zip(values, weights, strict=True)]
    half = quantile(0.5 + confidence / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return middle - half, middle + half


def slope(
    points: Sequence[tuple[str, float, float]], confidence: float = 0.95
) -> tuple[float, float | None, float | None] | None:
    """Least-squares slope of y over x with an own intercept for each group, and the ends of its interval.

    Args:
        points: Group, x, y.
        confidence: Of the interval.

    Returns:
        None where no group has two values of x; ends of None where nothing is left to tell the noise from.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, x, y in points:
        groups.setdefault(name, []).append((x, y))
    centred = []
    for held in groups.values():
        mean_x, mean_y = (statistics.fmean(values) for values in zip(*held, strict=True))
        centred += [(x - mean_x, y - mean_y) for x, y in held]
    spread = sum(x * x for x, _ in centred)
    if spread <= 1e-12:
        return None
    middle = sum(x * y for x, y in centred) / spread
    freedom = len(points) - len(groups) - 1
    if freedom < 1:
        return middle, None, None
    noise = sum((y - middle * x) ** 2 for x, y in centred) / freedom
    half = quantile(0.5 + confidence / 2, freedom) * math.sqrt(noise / spread)
    return middle, middle - half, middle + half


def p_value(values: Sequence[float]) -> float:
    """Chance of a mean as far from 0 as this, were the true one 0: Student's test, two-sided.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a test needs two values or more, got {len(values)}")
    middle, deviation = statistics.fmean(values), statistics.stdev(values)
    if deviation == 0.0:
        return 1.0 if middle == 0.0 else 0.0
    t = abs(middle) * math.sqrt(len(values)) / deviation
    return min(1.0, 2 * (1 - _cumulative(t, len(values) - 1)))


def holm(chances: Sequence[float]) -> list[float]:
    """The same for several tests at once, in the order given.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted = [0.0] * len(chances)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = highest
    return adjusted


def quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t of so many degrees of freedom lies with a probability of 0.5 or more."""
    low, high = 0.0, 1.0
    while _cumulative(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _cumulative(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _cumulative(t: float, freedom: int) -> float:
    """Probability of at most t >= 0, in the closed form of whole degrees of freedom.

    Source: Abramowitz and Stegun 1972, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for i in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    else:
        inside = sine * total
    return 0.5 + inside / 2
