"""Sparse Query Attention (Filipek 2025, arXiv 2510.01817): fewer query heads, each attending densely."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.configs.sqa import SQAConfig
from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionOutput,
    AttentionShape,
    ExplicitWeights,
)
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.dense import attend_to_all
from astbench_registry.toolbox.explicit import softmax_rows


class SQAttention(Attention):
    """softmax(Q K^T / sqrt(d)) V with H_q < H query heads: H / H_q times fewer operations than dense.

    The backbone hands over H query heads and wants H back. Groups of g = H / H_q consecutive heads are averaged
    into one, and its result is repeated for all of the group. That is the paper's layer with

        W_q' = mean of the group's slices of W_q,  W_o' = sum of the group's slices of W_o,

    any W_q' and W_o' can be had so, and pretrained projections start from their means, as in the uptraining of
    GQA (arXiv 2305.13245). A model with more key/value heads than H_q (any multi-head model, by default) has
    those averaged alike, into H_q: the paper's symmetric form, where H_q = H_kv.

    Differences: the projections keep the parameters (and the operations) of all H heads, so only what the
    attention itself saves shows in `flops`; untrained queries averaged over g heads are sqrt(g) times smaller
    than those of a projection of their own; in half precision the means are rounded to it before the dense kernel.
    """

    config: SQAConfig

    def __init__(self, config: SQAConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        able = [n for n in range(1, heads + 1) if heads % n == 0 and (n % kv_heads == 0 or kv_heads % n == 0)]
        self.num_query_heads = config.num_query_heads or max(n for n in able if n <= max(1, heads // 2))
        if self.num_query_heads not in able:
            raise ValueError(
                f"--attention.num_query_heads must be one of {', '.join(map(str, able))} for {heads} heads and "
                f"{kv_heads} key/value heads, got {self.num_query_heads}"
            )

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
        """See the base class. Time O(N M) for each of H_q heads; memory as dense attention."""
        stats = self.all_pairs(q, k, mask, context, f"sdpa-{q.device.type}")
        kv_heads = min(self.num_query_heads, k.shape[1])
        query = merge_heads(q, self.num_query_heads)
        out = attend_to_all(query, merge_heads(k, kv_heads), merge_heads(v, kv_heads), mask, scale=scale)
        return AttentionOutput(out.repeat_interleave(q.shape[1] // self.num_query_heads, 1), stats=stats)

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
        """See the base class: the weights of each of the H_q heads, for all heads of its group."""
        heads = min(self.num_query_heads, k.shape[1])
        q, k, v = mask.without_padding(q, k, v)
        query = merge_heads(q, self.num_query_heads).repeat_interleave(q.shape[1] // self.num_query_heads, 1)
        weights = softmax_rows(query, merge_heads(k, heads), mask, scale)
        return ExplicitWeights(weights, self.all_pairs(q, k, mask, context), merge_heads(v, heads))

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two matmuls of N x M x D for each query head that is left, masked pairs included."""
        return 4 * batch * self.num_query_heads * query_length * key_length * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The KV cache, of the averaged heads where there are more than H_q."""
        return 2 * min(self.num_query_heads, self.shape.num_kv_heads) * key_length * self.shape.head_dim


def merge_heads(x: Tensor, heads: int) -> Tensor:
    """`(batch, H, length, d)` -> `(batch, heads, length, d)`: means of consecutive heads, summed in float32."""
    if x.shape[1] == heads:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.unflatten(1, (heads, -1)).mean(2, dtype=wide).to(x.dtype)
