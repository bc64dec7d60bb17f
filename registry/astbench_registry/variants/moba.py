"""MoBA: mixture of block attention (Lu et al. 2025, arXiv 2502.13189, section 2.2)."""

from __future__ import annotations

from torch import Tensor

from astbench_registry.block_selection import BlockFeatures, Call, FactoredBlockSelection, Grid
from astbench_registry.block_selection.pooling import mean_keys
from astbench_registry.configs.moba import MoBAConfig
from astbench_registry.mask import AttentionMask


class MoBAttention(FactoredBlockSelection):
    """Each token attends to the `top_k` blocks I_i of best score, its own always among them; no parameters.

        MoBA(q, K, V) = softmax(q K[I]^T / sqrt(d)) V[I],   I = union of the I_i with g_i > 0      (eqs. 2, 3)
        g_i = 1 where s_i is among the top k of all s, else 0                                      (eq. 5)
        s_i = q . mean(K[I_i])                                                                     (eq. 6)

    Causal: a block that lies in the future of q is never chosen, its own always is, and within it the causal mask
    holds, so no choice depends on the future. Every query head chooses for itself. The choice has no gradient:
    in training the model learns around it.

    From `pooled_topk` it differs in the budget (a number of blocks, whatever the length, and no floor), in that the
    first block is not kept for its own sake, and in that every token chooses under all patterns.

    Differences from the paper:

    * It defines MoBA for causal self-attention alone. Without a causal mask all blocks compete here, the token's
      own is kept too, and in cross-attention, where there is none, all `top_k` are chosen.
    * A block that padding cuts short has the mean of its real keys.
    * With `lists="carried"` what a token chose all later tokens of its tile see too.
    * Dense layers among the sparse ones (its layer-wise hybrid, section 3.2) are not here.
    * It computes the own block and the chosen ones apart and merges them by their log-sum-exp (algorithm 1); here
      they are one list and one kernel call, with the same result.
    """

    config: MoBAConfig

    def block_features(self, call: Call, grid: Grid, *, fused: bool) -> BlockFeatures:
        """See the base class: the mean keys."""
        return BlockFeatures(mean_keys(call, grid, fused=fused))

    def factors(self, call: Call, features: BlockFeatures, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the base class: eq. 6."""
        return self.group_query(call, grid), features.key

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """Kept blocks, and one matmul for the scores."""
        blocks = -(-key_length // self.config.block_size)
        scores = 2 * batch * self.shape.num_heads * query_length * blocks * self.shape.head_dim
        kept = super().flops(batch, query_length, key_length, mask)
        return None if kept is None else kept + scores
