"""Dense softmax attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1) by torch's own kernels."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionMask,
    AttentionOutput,
)


class DenseAttention(Attention):
    """softmax(Q K^T / sqrt(d)) V over everything visible; the baseline of every comparison."""

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
        """See the base class. Time O(N M); memory O(N), but O(N M) when both padded and causal."""
        query_length, key_length = q.shape[2], k.shape[2]
        square = mask.query_offset == 0 and query_length == key_length
        plain = mask.key_valid is None and (not mask.causal or square)
        k, v = mask.without_padding(k, v)
        allowed = None if plain else mask.dense(query_length, key_length, q.device)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=plain and mask.causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        if allowed is not None:
            out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        return AttentionOutput(out, stats=self.all_pairs(q, k, mask, context, f"sdpa-{q.device.type}"))

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two matmuls of N x M x D per head, masked pairs included: what the FLOP counter sees."""
        return 4 * batch * self.shape.num_heads * query_length * key_length * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The KV cache."""
        return self.kv_cache_size(key_length)
