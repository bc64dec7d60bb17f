"""Control: blocks at random (cf. the random blocks of BigBird, Zaheer et al. 2020, arXiv 2007.14062)."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.block_selection import BlockSelectingAttention, Selection
from astbench_registry.configs.block_selection import RandomTopKConfig
from astbench_registry.interface import AttentionMask


class RandomTopKAttention(BlockSelectingAttention):
    """Scores are a hash of (seed, layer, head, group, block): fixed, so that a model can learn around it.

    A hash instead of a generator, so that padding, batch and decoding order cannot change the pattern.
    """

    config: RandomTopKConfig

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, selection: Selection, scale: float
    ) -> Tensor:
        """See the base class."""
        device = q.device
        head = torch.arange(self.shape.num_heads, device=device)[:, None, None]
        group = (selection.first // selection.query_group)[:, None]
        block = torch.arange(selection.num_blocks, device=device)
        mixed = _mix(torch.tensor(self.config.seed * 1_000_003 + self.shape.layer_index, device=device))
        for part in (head, group, block):
            mixed = _mix(mixed ^ part)
        uniform = (mixed & 0xFFFFFF).float() / 2**24
        return uniform.expand(q.shape[0], -1, -1, -1)


def _mix(x: Tensor) -> Tensor:
    """One round of splitmix64's finaliser on int64, whose products wrap around."""
    x = x + 0x1E3779B97F4A7C15
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
