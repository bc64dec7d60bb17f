"""Control: blocks at random (cf. the random blocks of BigBird, Zaheer et al. 2020, arXiv 2007.14062)."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.block_selection import BlockSelectingAttention, Call, Selection
from astbench_registry.configs.block_selection import RandomTopKConfig
from astbench_registry.toolbox.randomness import hashed_uniform


class RandomTopKAttention(BlockSelectingAttention):
    """Scores are a hash of (seed, layer, head, group, block): fixed, so that a model can learn around it.

    A hash instead of a generator, so that padding, batch and decoding order cannot change the pattern.
    """

    config: RandomTopKConfig

    def scores(self, call: Call, selection: Selection) -> Tensor:
        """See the base class."""
        device = call.q.device
        head = torch.arange(self.shape.num_heads, device=device)[:, None, None]
        group = (selection.first // selection.query_group)[:, None]
        block = torch.arange(selection.num_blocks, device=device)
        seed = self.config.seed * 1_000_003 + self.shape.layer_index
        uniform = hashed_uniform(seed, head, group, block)
        return uniform.expand(call.q.shape[0], -1, -1, -1)
