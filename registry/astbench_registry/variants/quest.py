"""Quest: pages by an upper bound of their keys' logits (Tang et al. 2024, arXiv 2406.10774, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_kernels.triton import pool_blocks
from astbench_registry.block_selection import BlockFeatures, Call, FactoredBlockSelection, Grid
from astbench_registry.block_selection.dense_layers import attend_densely
from astbench_registry.block_selection.pooling import extremes_of_blocks
from astbench_registry.configs.quest import QuestConfig
from astbench_registry.interface import AttentionContext, AttentionOutput, ExplicitWeights
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.explicit import softmax_rows


class QuestAttention(FactoredBlockSelection):
    """Each token attends to the `top_k` pages whose score is highest, its own always among them; no parameters.

        U_i = max(q_i m_i, q_i M_i) in channel i,   score of a page = sum_i U_i                 (algorithm 1)

    with m and M the minimum and maximum of each channel over the keys of the page: no key of it has a larger
    q . k. The sum is two matmuls, relu(q) . M - relu(-q) . m. The first `dense_layers` layers attend to everything.
    Every query head chooses for itself.

    Differences from the paper:

    * Quest serves decoding after a dense prefill. Here every token chooses under all patterns, in prefill and
      training too, so that decoding equals one full pass and the method can be trained with. Under a causal mask only
      completed pages compete, so no choice depends on the future.
    * The page of the token itself, perhaps incomplete, is always kept and counts in `top_k`, as in the published
      code; without a causal mask it is kept too, and cross-attention has none.
    * A page that padding cuts short has the extremes of its real keys.
    * With `lists="carried"` what a token chose all later tokens of its tile see too.
    """

    config: QuestConfig

    @property
    def dense(self) -> bool:
        """This layer attends to everything."""
        return self.shape.layer_index < self.config.dense_layers

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> AttentionOutput:
        """See the base class; a dense layer takes O(N M)."""
        if not self.dense:
            return super().forward(q, k, v, mask, scale=scale, context=context)
        call = Call.of(self.shape, q, k, v, mask, scale, context)
        return attend_densely(call, self.selection(call), tiled=self.selector.tile(mask) is not None)

    def explicit_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> ExplicitWeights:
        """See the base class; of everything visible in a dense layer."""
        if not self.dense:
            return super().explicit_weights(q, k, v, mask, scale=scale, context=context)
        return ExplicitWeights(softmax_rows(q, k, mask, scale), self.all_pairs(q, k, mask, context))

    def block_features(self, call: Call, grid: Grid, *, fused: bool) -> BlockFeatures:
        """See the base class: each page's maxima and minima."""
        if fused:
            pooled = pool_blocks(call.k, call.k, call.mask.key_valid, grid.block_size)
            return BlockFeatures(torch.cat([pooled.max_key, pooled.min_key], -1))
        return BlockFeatures(torch.cat(extremes_of_blocks(call.k, call.mask, grid), -1))

    def factors(self, call: Call, features: BlockFeatures, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the base class: relu(q) and -relu(-q)."""
        query = self.group_query(call, grid)
        return torch.cat([query.clamp(min=0), query.clamp(max=0)], -1), features.key

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """Kept pages, and two matmuls for the scores; a dense layer's are dense attention's."""
        per_key = batch * self.shape.num_heads * query_length * self.shape.head_dim
        if self.dense:
            return 4 * per_key * key_length
        pages = -(-key_length // self.config.block_size)
        kept = super().flops(batch, query_length, key_length, mask)
        return None if kept is None else kept + 4 * per_key * pages
