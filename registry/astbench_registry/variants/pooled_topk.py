"""Control: blocks by query times mean key, no parameters (cf. MoBA, Lu et al. 2025, arXiv 2502.13189)."""

from __future__ import annotations

from torch import Tensor

from astbench_kernels.triton import pool_blocks
from astbench_registry.block_pooling import mean_of_blocks
from astbench_registry.block_selection import BlockSelectingAttention, Grid
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
            pooled = mean_of_blocks(k, mask, grid)
        return self.speaker(q, mask, grid) * scale, pooled
