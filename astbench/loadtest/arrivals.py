"""When requests are due. Imports nothing heavy."""

from __future__ import annotations

import random


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds from the start at which requests are due: independent of one another, `rate` a second on average."""
    rng, due, at = random.Random(seed), [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        due.append(at)
    return due


def poisson_count(rate: float, count: int, seed: int) -> list[float]:
    """So many of them. At twice the rate the same requests are due at half the time: rates differ in nothing else."""
    rng, due, at = random.Random(seed), [], 0.0
    for _ in range(count):
        at += rng.expovariate(1.0)
        due.append(at / rate)
    return due
