"""Control: blocks by query times mean key, no parameters (cf. MoBA, Lu et al. 2025, arXiv 2502.13189)."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_kernels.triton import pool_blocks
from astbench_registry.block_selection import (
    BlockSelectingAttention,
    Grid,
    block_mean,
    in_blocks,
    valid_in_blocks,
)
from astbench_registry.interface import AttentionMask


class PooledTopKAttention(BlockSelectingAttention):
    """`s_ij = scale * q_i . mean(k in block j)`: what the untrained AST predictor is.

    Unlike MoBA, the budget, the always-kept blocks and the groups are AST's, so that the two differ in the
    learned term alone.
    """

    def factors(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, grid: Grid, scale: float, *, fused: bool
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if fused:
            pooled = pool_blocks(k, k, mask.key_valid, grid.block_size).mean_key
        else:
            valid = mask.key_valid
            if valid is None:
                valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
            keys = k.to(torch.promote_types(k.dtype, torch.float32))
            blocks, size = grid.num_blocks, grid.block_size
            pooled = block_mean(in_blocks(keys, blocks, size), valid_in_blocks(valid, blocks, size))
        return self.speaker(q, mask, grid) * scale, pooled
