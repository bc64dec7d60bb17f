"""Sliding-window attention (Beltagy et al. 2020, arXiv 2004.05150, section 3.1), in linear memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from astbench_kernels.layout import ceil_div
from astbench_registry.configs.local import LocalConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionStats, ExplicitWeights
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.explicit import softmax_rows

MIN_CHUNK = 32
"""Query rows handled together at least; below, the copies of the keys cost more than they save."""


class LocalAttention(Attention):
    """Each query sees keys j with |i - j| <= window (causal: i - window <= j <= i).

    Queries are cut into chunks of about `window` rows; each chunk reads one run of chunk + 2 window keys, so
    memory is O(N), at most three copies of the keys. The paper counts w on both sides together; here `window`
    is one side, w/2.
    """

    config: LocalConfig

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
        """See the base class. Time and memory O(N window)."""
        batch, heads, length, _ = q.shape
        key_length, window = k.shape[2], min(self.config.window, k.shape[2])
        chunk = min(max(window, MIN_CHUNK), length)
        chunks = ceil_div(length, chunk)
        first = torch.arange(chunks, device=q.device) * chunk + mask.query_offset
        reach = chunk + (1 if mask.causal else 2) * window
        position = first[:, None] - window + torch.arange(reach, device=q.device)  # (chunks, reach)
        row = first[:, None] + torch.arange(chunk, device=q.device)  # (chunks, chunk)
        near = (position[:, None, :] - row[:, :, None]).abs() <= window  # (chunks, chunk, reach)
        if mask.causal:
            near &= position[:, None, :] <= row[:, :, None]
        inside = (position >= 0) & (position < key_length)
        index = position.clamp(0, key_length - 1)
        allowed = (near & inside[:, None, :])[None]  # (batch or 1, chunks, chunk, reach)
        if mask.key_valid is not None:
            allowed = allowed & mask.key_valid[:, index][:, :, None, :]
        q, k, v = mask.without_padding(q, k, v)

        rows = pad(q, (0, 0, 0, chunks * chunk - length)).unflatten(2, (chunks, chunk))
        out = scaled_dot_product_attention(
            rows.transpose(1, 2).flatten(0, 1),  # (batch * chunks, heads, chunk, head_dim)
            k[:, :, index].transpose(1, 2).flatten(0, 1),
            v[:, :, index].transpose(1, 2).flatten(0, 1),
            attn_mask=allowed.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1),
            scale=scale,
            enable_gqa=heads != k.shape[1],
        )
        empty = ~allowed.any(-1).expand(batch, -1, -1).flatten(1)[:, None, :length, None]
        out = out.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
        stats = None
        if context is not None and context.collect_stats:
            stats = self._stats(q, k, allowed.expand(batch, -1, -1, -1).flatten(1, 2)[:, :length], mask)
        return AttentionOutput(out.masked_fill(empty, 0.0), stats=stats)

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
        """See the base class."""

        def near(rows: Tensor) -> Tensor:
            key = torch.arange(k.shape[2], device=q.device)
            return (key - (rows + mask.query_offset)[:, None]).abs() <= self.config.window

        stats = self.some_pairs(q, k, mask, context, near(torch.arange(q.shape[2], device=q.device)))
        return ExplicitWeights(softmax_rows(q, k, mask, scale, near), stats)

    def _stats(self, q: Tensor, k: Tensor, allowed: Tensor, mask: AttentionMask) -> AttentionStats:
        attended = allowed.sum((1, 2), dtype=torch.float64)[:, None].expand(-1, q.shape[1])
        return AttentionStats(attended, mask.visible_pairs(q, k), f"sdpa-{q.device.type}")

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two matmuls over each chunk's run of keys."""
        window = min(self.config.window, key_length)
        chunk = min(max(window, MIN_CHUNK), query_length)
        rows = ceil_div(query_length, chunk) * chunk
        reach = chunk + (1 if mask.causal else 2) * window
        return 4 * batch * self.shape.num_heads * rows * reach * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The last `window` keys and values, and the current one."""
        return self.kv_cache_size(min(key_length, self.config.window + 1))
