"""Control: blocks by query times mean key, no parameters (cf. MoBA, Lu et al. 2025, arXiv 2502.13189)."""

from __future__ import annotations

from torch import Tensor

from astbench_registry.block_selection import BlockSelectingAttention, Grid
from astbench_registry.block_selection.pooling import mean_keys
from astbench_registry.mask import AttentionMask


class PooledTopKAttention(BlockSelectingAttention):
    """`s_ij = scale * q_i . mean(k in block j)`: what the untrained AST predictor is.

    Unlike MoBA, the budget, the always-kept blocks and the groups are AST's, so that the two differ in the
    learned term alone.
    """

    def summarise(self, k: Tensor, v: Tensor, mask: AttentionMask, grid: Grid, *, fused: bool) -> tuple[Tensor, ...]:
        """See the base class: the mean keys."""
        return mean_keys(k, mask, grid, fused=fused)

    def factors(
        self, q: Tensor, blocks: tuple[Tensor, ...], mask: AttentionMask, grid: Grid, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return self.speaker(q, mask, grid) * scale, blocks[0]
