"""What the conformance suite's checks share: how they are marked, how they fail, and what they compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from astbench_registry.capabilities import PATTERNS, Pattern
from astbench_registry.conformance.cases import Subject
from astbench_registry.findings import Failure, Skip

TOLERANCE = 1e-10  # float64; sums may be taken in another order, nothing else may differ

Check = Callable[[Subject], None]
"""A property: the first line of its docstring says what must hold. It returns, or raises."""

APPLIES: dict[str, tuple[Pattern, ...]] = {}
"""Name of a check to the patterns it is about."""


def holds_for(*patterns: Pattern) -> Callable[[Check], Check]:
    """Mark a check with the patterns it is about; all by default."""

    def mark(function: Check) -> Check:
        APPLIES[function.__name__] = patterns or PATTERNS
        return function

    return mark


def need(capability: bool, reason: str) -> None:
    """Skip the check, for this reason, where the capability record excludes it."""
    if not capability:
        raise Skip(reason)


def demand(condition: bool, message: str) -> None:
    """Fail the check with this message unless the condition holds."""
    if not condition:
        raise Failure(message)


def differ(actual: Tensor, expected: Tensor, *, tolerance: float = TOLERANCE) -> bool:
    """Whether :func:`same` would fail."""
    return not bool(((actual - expected).detach().abs() <= tolerance).all())


def same(actual: Tensor, expected: Tensor, what: str, *, tolerance: float = TOLERANCE) -> None:
    """Equal within float64 rounding; NaN anywhere is a difference."""
    demand(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if not actual.numel():
        return
    difference = (actual - expected).detach().abs().nan_to_num(nan=torch.inf)
    worst = difference.max()
    moved = int((difference > tolerance).sum())
    demand(moved == 0, f"{what}: {moved} of {difference.numel()} numbers differ, by up to {worst:.1e}")
