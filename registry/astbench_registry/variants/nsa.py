"""Native sparse attention: compression, selection and a window (Yuan et al. 2025, arXiv 2502.11089)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad

from astbench_kernels.layout import last_key
from astbench_registry.block_selection import BlockSelector, Call, Selection, block_scores
from astbench_registry.block_selection.coarse_keys import (
    COARSE_BLOCK,
    COARSE_GROUP,
    every_coarse_block,
    listed_coarse_blocks,
)
from astbench_registry.block_selection.dense_weights import rows_at_a_time
from astbench_registry.block_selection.lists import computed_tiles, lists_of
from astbench_registry.block_selection.summaries import BlockSummaries
from astbench_registry.configs.nsa import NSAConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape, AttentionStats
from astbench_registry.mask import AttentionMask
from astbench_registry.registry import build_attention
from astbench_registry.toolbox.widening import widened


class Compression(nn.Module):
    """phi: `size` consecutive keys or values to one, every `stride` tokens; the plain mean at first.

    phi(x) = mean(x) + W_2 gelu(W_1 [x_1 + p_1; ...; x_l + p_l]), weights per key/value head, W_2 and p zero at first.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.position = nn.Parameter(torch.zeros(num_kv_heads, size, head_dim))
        self.inner = nn.Parameter(torch.empty(num_kv_heads, size * head_dim, head_dim))
        self.outer = nn.Parameter(torch.zeros(num_kv_heads, head_dim, head_dim))
        nn.init.normal_(self.inner, std=(size * head_dim) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, kv_heads, length, d)` to `(batch, kv_heads, windows, d)`, float32 or more.

        In front stand `size / stride - 1` windows of zeros, so that number `j` ends at position
        `(j + 1) * stride - 1`. A sequence shorter than a window has none at all.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.shape[2] < self.size:
            return x[:, :, :0]
        windows = x.unfold(2, self.size, self.stride).transpose(-1, -2)  # (batch, kv_heads, windows, size, d)
        moved = (windows + self.position.to(x.dtype)[:, None]).flatten(3)
        mixed = torch.matmul(gelu(torch.matmul(moved, self.inner.to(x.dtype))), self.outer.to(x.dtype))
        return pad(windows.mean(3) + mixed, (0, 0, self.size // self.stride - 1, 0))


class NativeSparseAttention(Attention):
    """Three attentions per query head, summed with gates that are read from the layer's input x.

        o = sum over c in (cmp, slc, win) of g_c Attn(q, K_c, V_c),   g = sigmoid(W_g x + b)            (eq. 5)
        K_cmp = phi(k[i d : i d + l]) for all i,   V_cmp likewise                                       (eq. 7)
        p_cmp = softmax(q K_cmp^T / sqrt(head_dim))                                                     (eq. 8)
        p_slc[j] = sum_m sum_n p_cmp[j l'/d + m - n],   m < l'/d,  n < l/d                              (eq. 9)
        p'_slc = sum of p_slc over the query heads that share a key/value head                         (eq. 10)
        K_slc = the blocks of l' keys with the `top_k` largest p'_slc                              (eqs. 11, 12)
        K_win = the last `window` keys

    with l = `compress_size`, d = `compress_stride`, l' = `block_size`. Causal: a compressed token is seen once its last
    token is, and only completed blocks compete; the first block, the token's own and the one before are always
    selected and count in `top_k`. So no choice depends on the future, and decoding equals one full pass.

    With one size for l, d and l' compression and selection agree with flash-linear-attention's plain reference
    (fla-core 0.6), which pools keys as phi does at the start.

    Differences from the paper:

    * One set of keys and values, the backbone's, serves all branches; the paper projects three. phi and the gates are
      all that is new, so the method can be put into a model that is there.
    * Equation 9 is written there with p_cmp[j l'/d - m - n], which for j = 0 names no window: here a window counts once
      for every d tokens that it shares with the block, what the text says.
    * phi is the paper's perceptron with positions inside the window, plus the mean, so that it starts as the mean.
    * The gates are one linear map, zero at the start: every gate 1/2.
    * Keys carry the backbone's rotary encoding, if it has one, when phi reads them.
    * Windows that hold padding are left out, as are those that the end cuts short.
    * With `lists="carried"` what a token selected all later tokens of its tile see too.
    * Without a causal mask everything may be chosen, the window has both sides, and the block behind is kept too.
    * p_cmp is computed twice, in the kernel for the output and a few rows at a time for the choice, as in the paper's
      training; its decoding need not, and it keeps compressed tokens in a cache where each call here makes them anew.
    * The paper's kernel reads a selected block once for all heads of a group; here as the chosen backend does it.
    """

    config: NSAConfig
    block_sparse = True

    def __init__(self, config: NSAConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.selector = BlockSelector(config)
        sizes = (shape.num_kv_heads, shape.head_dim, config.compress_size, config.compress_stride)
        self.compress_key, self.compress_value = Compression(*sizes), Compression(*sizes)
        self.gate = nn.Linear(shape.hidden_size, 3 * shape.num_heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.window = build_attention("local", {"window": config.window - 1}, shape)

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
        """See the base class. Time O(N (top_k block_size + window) + N M / compress_stride)."""
        call = Call.of(self.shape, q, k, v, mask, scale, context)
        selection = self.selector.selection(call)
        backend = call.backend(self.config.backend)
        with torch.autocast(q.device.type, enabled=False):
            call = call.without_padding()
            gates = self._gates(call.context.hidden_states, mask)
            compressed = self._compressed(call)
            keep = self.selector.choose(self.block_mass(compressed, selection), selection)
            layout = lists_of(keep, call, selection, self.selector.tile(mask))
            seen = every_coarse_block(call.q, compressed.k.shape[2], self.config.compress_stride, mask)
        selected, _ = call.attend(layout, backend)
        near = self.window(call.q, call.k, call.v, mask, scale=call.scale, context=call.context)
        out = gates[..., 1:2] * selected + gates[..., 2:3] * near.out
        if compressed.k.shape[2]:
            few = replace(compressed, k=compressed.k.to(q.dtype), v=compressed.v.to(q.dtype))
            out = out + gates[..., 0:1] * few.attend(seen, backend)[0]
        if not call.context.collect_stats:
            return AttentionOutput(out.to(q.dtype))
        ran = call.ran(layout, backend)
        layout = layout.expand_heads(self.shape.num_heads)
        attended = layout.attended_pairs(causal=mask.causal, key_valid=mask.key_valid)
        assert near.stats is not None, "asked for in its context"
        beside = near.stats.attended + seen.attended_pairs(causal=mask.causal, key_valid=compressed.mask.key_valid)
        visible, tiles = mask.visible_pairs(q, k), None
        if self.selector.tile(mask) is not None:
            tiles = computed_tiles(layout, visible, causal=mask.causal)
        stats = AttentionStats(attended, visible, ran, layout, beside, tiles=tiles)
        return AttentionOutput(out.to(q.dtype), stats=stats)

    def new_cache_state(self) -> BlockSummaries | None:
        """See the base class: the running list of the last tile, where lists are carried."""
        return BlockSummaries() if self.config.lists == "carried" else None

    def _compressed(self, call: Call) -> Call:
        """The same call with compressed keys and values, float32 or more, and which of their windows are real."""
        key = self.compress_key(call.k)
        mask = replace(call.mask, key_valid=self._real_windows(key, call.mask))
        return replace(call, k=key, v=self.compress_value(call.v), mask=mask)

    @torch.no_grad()
    def block_mass(self, compressed: Call, selection: Selection) -> Tensor:
        """Equations 8 to 10: `(batch, num_kv_heads, query_length, blocks)`, what compressed keys say of each block.

        Args:
            compressed: From :meth:`_compressed`.
            selection: The blocks.
        """
        q, k, real = compressed.q, compressed.k, compressed.mask.key_valid
        config, shared = self.config, self.shape.num_heads // self.shape.num_kv_heads
        parts, overlap = config.block_size // config.compress_stride, config.compress_size // config.compress_stride
        if not k.shape[2]:
            return k.new_zeros(k.shape[0], k.shape[1], selection.num_groups, selection.num_blocks)
        assert real is not None
        behind = selection.num_blocks * parts + overlap - 1 - k.shape[2]
        window = torch.arange(k.shape[2], device=q.device)
        found = []
        for rows in torch.arange(q.shape[2], device=q.device).split(rows_at_a_time(q, k)):
            hidden = ~real[:, None, None, :]
            if compressed.mask.causal:
                position = rows + compressed.mask.query_offset
                hidden = hidden | (window > last_key(position, config.compress_stride)[:, None])
            logits = (block_scores(q[:, :, rows].to(k.dtype), k) * compressed.scale).masked_fill(hidden, -torch.inf)
            weights = logits.softmax(-1).nan_to_num(0.0).unflatten(1, (-1, shared)).sum(2)
            weights = pad(weights, (0, behind)).unfold(-1, overlap, 1).sum(-1)  # of every `compress_stride` tokens
            found.append(weights.unflatten(-1, (selection.num_blocks, parts)).sum(-1))
        return torch.cat(found, 2)

    def _real_windows(self, key: Tensor, mask: AttentionMask) -> Tensor:
        """Bool `(batch, windows)`: windows of real keys only, not those of zeros in front."""
        config, windows = self.config, key.shape[2]
        extra = config.compress_size // config.compress_stride - 1
        real = torch.arange(windows, device=key.device).expand(key.shape[0], -1) >= extra
        if mask.key_valid is not None and windows:
            whole = mask.key_valid.unfold(1, config.compress_size, config.compress_stride).all(-1)
            real = real & pad(whole, (extra, 0))
        return real

    def _gates(self, hidden: Tensor | None, mask: AttentionMask) -> Tensor:
        """`(batch, num_heads, query_length, 3)`, float32 or more: compression, selection, window."""
        assert hidden is not None, "the capability record asks for hidden states"
        valid = mask.valid_queries(hidden.shape[1])
        if valid is not None:
            hidden = hidden.masked_fill(~valid[:, :, None], 0.0)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gates = linear(hidden.to(wide), widened(self.gate.weight, wide), widened(self.gate.bias, wide)).sigmoid()
        return gates.unflatten(-1, (self.shape.num_heads, 3)).transpose(1, 2)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """Selected blocks, window, compressed tokens (twice their scores), phi and gates; None for carried lists."""
        if self.selector.tile(mask) is not None:
            return None
        shape, config = self.shape, self.config
        windows = max(0, (key_length - config.compress_size) // config.compress_stride + 1)
        keys = windows and windows + config.compress_size // config.compress_stride - 1  # those of zeros included
        listed = int(listed_coarse_blocks(query_length, keys, config.compress_stride, mask).sum())
        near = self.window.flops(batch, query_length, key_length, mask)
        assert near is not None, "local attention declares its cost"
        compressed = (
            2 * shape.num_heads * shape.head_dim * (2 * listed * COARSE_BLOCK * COARSE_GROUP + query_length * keys)
        )
        phi = 4 * shape.num_kv_heads * windows * shape.head_dim**2 * (config.compress_size + 1)
        gates = 2 * query_length * shape.hidden_size * 3 * shape.num_heads
        selected = 4 * shape.num_heads * shape.head_dim * self.selector.kept_keys(query_length, key_length, mask)
        return near + batch * (selected + compressed + phi + gates)

    def state_size(self, key_length: int) -> int:
        """The KV cache: any block may be chosen later."""
        return self.kv_cache_size(key_length)
