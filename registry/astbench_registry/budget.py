"""How much of a call a threshold would keep: counted over calls, so that the threshold can be chosen for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST = -40
"""Logarithm to base 2 of the smallest share that is told apart from nothing."""

BINS_PER_DOUBLING = 64


class ShareCounts:
    """What would be kept at every threshold on the share of a row's free mass.

    A unit is what is kept or left out as one: a tile of rows and a block where lists are carried, else a row (or group
    of rows) and a block. Calls of all layers and heads go into one count: a head whose mass is spread then keeps more
    than one whose mass lies in few blocks.
    """

    def __init__(self) -> None:
        self.visible = 0
        self.always_kept = 0
        self._bins: Tensor | None = None

    def add(self, log_share: Tensor, always_kept: Tensor, visible: Tensor) -> None:
        """Count the units of one call; waits for the device.

        Args:
            log_share: Any shape: natural logarithm of the largest share that a row of the unit has for its block.
            always_kept: Bool, broadcastable: kept whatever the threshold.
            visible: Bool, broadcastable: some row of the unit may see the block.
        """
        always_kept, visible = (x.expand_as(log_share) for x in (always_kept & visible, visible))
        self.visible += int(visible.sum())
        self.always_kept += int(always_kept.sum())
        there = log_share[visible & ~always_kept].double() / math.log(2)
        place = ((there.clamp(LOWEST, 0.0) - LOWEST) * BINS_PER_DOUBLING).floor().long()
        found = place.bincount(minlength=-LOWEST * BINS_PER_DOUBLING + 1).cpu()
        self._bins = found if self._bins is None else self._bins + found

    def density(self, share: float) -> float:
        """The share of visible units that this threshold keeps, to the nearest bin."""
        if not self.visible or self._bins is None:
            return 1.0
        edges = 2.0 ** (torch.arange(len(self._bins), dtype=torch.float64) / BINS_PER_DOUBLING + LOWEST)
        return (self.always_kept + int(self._bins[edges >= share * (1 - 1e-9)].sum())) / self.visible

    def share_for(self, density: float) -> float:
        """The least share whose units are not more than `density` of the visible ones; 1 where all are too many."""
        if not self.visible or self._bins is None:
            return 1.0
        kept = self.always_kept + self._bins.flip(0).cumsum(0)  # of the last bin, of the last two, ...
        bins = int((kept <= density * self.visible).sum())
        return float(2.0 ** min(0.0, (len(self._bins) - bins) / BINS_PER_DOUBLING + LOWEST))
