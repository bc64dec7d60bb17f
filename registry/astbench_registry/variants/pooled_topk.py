"""Control: blocks by query times mean key, no parameters (cf. MoBA, Lu et al. 2025, arXiv 2502.13189)."""

from __future__ import annotations

from torch import Tensor

from astbench_registry.block_selection import BlockFeatures, Call, FactoredBlockSelection, Grid
from astbench_registry.block_selection.pooling import mean_keys


class PooledTopKAttention(FactoredBlockSelection):
    """`s_ij = scale * q_i . mean(k in block j)`: what the untrained AST predictor is.

    Unlike MoBA, the budget, the always-kept blocks and the groups are AST's, so that the two differ in the
    learned term alone.
    """

    def block_features(self, call: Call, grid: Grid, *, fused: bool) -> BlockFeatures:
        """See the base class: the mean keys."""
        return BlockFeatures(mean_keys(call, grid, fused=fused))

    def factors(self, call: Call, features: BlockFeatures, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return self.group_query(call, grid) * call.scale, features.key
