"""Counts of attention values on a log axis, by head: what thresholds are found by, and a study of values looks at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DECADES, PER_DECADE = 12, 100
"""From 1e-12 to 1, a hundred bins each: an edge stands at every power of ten, and a bin is 2.3% wide."""

BINS = DECADES * PER_DECADE


class ValueCounts:
    """How often attention values fell into each bin, over calls.

    Attributes:
        counts: int64 `(heads, 1 + BINS)`: of values below the first edge, zero among them, then of each bin.
        rows: Query rows of each head that see something.
        entropy: float64 `(heads,)`: sum over these rows of -sum a log2 a, in bits.
    """

    def __init__(self, heads: int) -> None:
        self.counts = torch.zeros(heads, 1 + BINS, dtype=torch.int64)
        self.rows = 0
        self.entropy = torch.zeros(heads, dtype=torch.float64)

    def add(self, weights: Tensor, visible: Tensor) -> None:
        """Count the visible pairs of `(batch, heads, rows, keys)`; `visible` bool `(batch, 1, rows, keys)`."""
        heads = weights.shape[1]
        place = weights.clamp(min=0).double().log10_().add_(DECADES).mul_(PER_DECADE)
        place.add_(1e-6).floor_().add_(1).clamp_(0, BINS)  # a value on an edge is not to fall below it by rounding
        place = place.long().add_(torch.arange(heads, device=weights.device)[:, None, None] * (1 + BINS))
        found = torch.bincount(place.flatten(), minlength=heads * (1 + BINS)).view(heads, -1).cpu()
        found[:, 0] -= int((~visible).sum())  # hidden pairs weigh nothing, and were counted so
        self.counts += found
        self.rows += int(visible.any(-1).sum())
        bits = torch.special.entr(weights).sum((0, 2, 3), dtype=torch.float64) / math.log(2)
        self.entropy += bits.cpu()

    @property
    def total(self) -> Tensor:
        """int64 `(heads,)`: visible pairs."""
        return self.counts.sum(1)

    def share_below(self, value: float) -> Tensor:
        """float64 `(heads,)`: share of the visible pairs below a value, which is taken for the next lower edge."""
        edge = int((edges() <= value * (1 + 1e-9)).sum())  # edges that are not above it
        return self.counts[:, :edge].sum(1).double() / self.total.clamp(min=1)

    def threshold_for(self, share: float) -> Tensor:
        """float64 `(heads,)`: the edge below which the share of the visible pairs is nearest to `share`; 0 for none."""
        below = self.counts.cumsum(1)[:, :-1].double() / self.total.clamp(min=1)[:, None]  # below edge 0, 1, ...
        below = torch.cat([torch.zeros(len(below), 1), below], 1)
        candidates = torch.cat([torch.zeros(1, dtype=torch.float64), edges()[:-1]])
        return candidates[(below - share).abs().argmin(1)]

    def together(self) -> ValueCounts:
        """All heads as one."""
        return self.sum([self])

    @staticmethod
    def sum(parts: list[ValueCounts]) -> ValueCounts:
        """Several layers' counts, all heads as one."""
        one = ValueCounts(1)
        for part in parts:
            one.counts += part.counts.sum(0, keepdim=True)
        return one


def edges() -> Tensor:
    """float64 `(BINS + 1,)`: the bins' edges, from 1e-12 to 1."""
    return torch.pow(10.0, torch.arange(BINS + 1, dtype=torch.float64) / PER_DECADE - DECADES)
