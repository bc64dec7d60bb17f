"""Sparse Sinkhorn attention (Tay et al. 2020, arXiv 2002.11296)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from astbench_kernels.layout import ceil_div
from astbench_registry.configs.sinkhorn import SinkhornConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape, AttentionStats
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.randomness import generator
from astbench_registry.toolbox.widening import widened

HIDDEN = -1e9
"""Logarithm of nothing, finite so that a row of nothing has gradients of zero."""

LEAST_SHARE = 1e-6
"""A sorted place of which less than this is real tokens is left out."""


class SinkhornAttention(Attention):
    """Each query sees its own block and the block that a soft permutation S puts in its block's place.

    For blocks u, v of keys and values, and place t within a block:

        R_uv = norm(a_u) W norm(b_v) / sqrt(d)               b_v: mean key of block v
        log S = (R + Gumbel noise while training) / temperature, then num_iterations times:
            rows:    log S_uv -= log sum_v S_uv
            columns: log S_uv -= log sum_u S_uv
        K'_ut = sum_v S_uv K_vt,   V'_ut = sum_v S_uv V_vt
        Y_i = softmax(scale q_i [K'_u ; K_u]) [V'_u ; V_u]      for a query i of block u

    Without a mask a_u is b_u. Causal: a_u is the mean key up to block u's first token, only blocks v < u may be
    sorted to u (block 0 has its own tokens alone), the columns' sums run over the rows up to u, and a last
    normalisation of the rows makes K'_u a mean of past keys. So neither S_u nor K'_u depends on what comes later.

    Differences. The paper's sorting network maps a block's summed embedding to one score per block of a fixed
    length; the bilinear form above takes any number of blocks, reads the keys of each key/value head, and norms
    their means (RMS) so that scores start near 1 whatever the block size. The paper adds the logits of both blocks,
    place by place; here, as in the sinkhorn_transformer package, both stand side by side in one softmax. The
    paper's causal balancing masks later blocks; the running sums, without the own block, are what makes it strict
    here. SortCut and mixtures with dense attention are left out. Blocks are cut from the real tokens, padding left
    out. A sequence's last block may be partly filled: a sorted place then
    holds the mean of the real tokens there, weighted by their share of S_u. The mixture costs N^2 / block_size
    multiply-adds per channel, which the paper's count leaves out. Decoding computes everything anew from the cache.
    """

    config: SinkhornConfig

    def __init__(self, config: SinkhornConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.sort_weight = nn.Parameter(torch.empty(shape.num_kv_heads, shape.head_dim, shape.head_dim))
        nn.init.normal_(self.sort_weight, std=shape.head_dim**-0.5)

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
        """See the base class. Memory O(N block_size + (N / block_size)^2)."""
        context = context or AttentionContext()
        scale = self.shape.head_dim**-0.5 if scale is None else scale
        compute = torch.promote_types(q.dtype, torch.float32)
        batch, _, keys, _ = k.shape
        first, last = mask.query_offset, mask.query_offset + q.shape[2]
        valid = mask.key_valid
        if valid is None:
            valid = torch.ones(batch, keys, dtype=torch.bool, device=k.device)
        q, k, v = mask.without_padding(q, k, v)
        # Queries that are not given (they precede a decoding step) are computed as zeros and cut off again.
        everyone = pad(q, (0, 0, first, keys - last))
        order = (~valid).to(torch.uint8).argsort(stable=True, dim=-1)  # real tokens to the front
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_ = (_take(x.to(compute), order) for x in (everyone, k, v))
            size = min(self.config.block_size, keys)
            q_, k_, v_ = (_in_blocks(x, size) for x in (q_, k_, v_))
            places = torch.arange(k_.shape[2] * size, device=k.device).view(-1, size)
            real = places < valid.sum(-1)[:, None, None]  # (batch, blocks, block)
            sorting = self.sorting(k_, real, mask.causal, context.step)
            out, slots = sorted_attention(q_, k_, v_, sorting, real, causal=mask.causal, scale=scale)
        out = _take(out.flatten(2, 3), order.argsort(-1))
        out = out.masked_fill(~valid[:, None, :, None], 0.0)[:, :, first:last].to(q.dtype)
        stats = None
        if context.collect_stats:
            slots = slots.flatten(2).gather(-1, order.argsort(-1)[:, None].expand(-1, slots.shape[1], -1))
            stats = self._stats(q, k, slots.masked_fill(~valid[:, None], 0)[..., first:last], valid, mask)
        return AttentionOutput(out, stats=stats)

    def sorting(self, k: Tensor, real: Tensor, causal: bool, step: int = 0) -> Tensor:
        """The soft permutation S.

        Args:
            k: Keys in blocks, `(batch, kv_heads, blocks, block, head_dim)`, zeros where there is none.
            real: Bool `(batch, blocks, block)`.
            causal: Only earlier blocks are sorted to a block.
            step: Training step, for the noise.

        Returns: `(batch, kv_heads, blocks, blocks)`; rows and columns of blocks without real tokens are zero.
        """
        count, total = real.sum(-1)[:, None, :, None], k.sum(3)
        column = row = total / count.clamp(min=1)
        if causal:
            seen = torch.arange(k.shape[2], device=k.device)[:, None] * k.shape[3] + 1
            row = (total.cumsum(2) - total + k[:, :, :, 0]) / seen
        row, column = (rms_norm(x, x.shape[-1:], eps=1e-7) for x in (row, column))
        scores = row @ widened(self.sort_weight, k.dtype) @ column.transpose(-1, -2) * self.shape.head_dim**-0.5
        if self.training:
            scores = scores + self._gumbel(scores, step)
        exists = count[..., 0] > 0
        allowed = exists[..., :, None] & exists[..., None, :]
        if causal:
            allowed = allowed & torch.ones_like(allowed).tril(-1)
        return sinkhorn(scores / self.config.temperature, allowed, self.config.num_iterations, causal)

    def _gumbel(self, like: Tensor, step: int) -> Tensor:
        g = generator(self.config.seed, self.shape.layer_index, step)
        noise = torch.empty(like.shape).exponential_(generator=g).clamp(min=torch.finfo(torch.float32).tiny)
        return -noise.log().to(like)

    def _stats(self, q: Tensor, k: Tensor, slots: Tensor, valid: Tensor, mask: AttentionMask) -> AttentionStats:
        """Pairs within the own block, and beside them the sorted places, each a mixture of keys.

        A query has no more of both than it may see keys.
        """
        rank = valid.cumsum(-1)
        seen = rank if mask.causal else valid.sum(-1, keepdim=True).expand_as(valid)
        size = min(self.config.block_size, k.shape[2])
        block = (rank - 1).clamp(min=0) // size
        own = (seen - block * size).clamp(max=size) * valid
        rows = slice(mask.query_offset, mask.query_offset + q.shape[2])
        own, seen = own[:, None, rows], seen[:, None, rows]
        beside = (torch.minimum(slots, seen) - own).clamp(min=0)
        each = q.shape[1] // k.shape[1]
        pairs = [x.expand_as(slots).sum(-1, dtype=torch.float64).repeat_interleave(each, 1) for x in (own, beside)]
        return AttentionStats(pairs[0], mask.visible_pairs(q, k), f"torch-{q.device.type}", coarse=pairs[1])

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """The sorting scores, the mixture of keys, values and shares, and two matmuls with two blocks."""
        size, dim = min(self.config.block_size, key_length), self.shape.head_dim
        blocks = ceil_div(key_length, size)
        scores = blocks * dim * dim + blocks * blocks * dim
        mixture = blocks * blocks * size * (2 * dim + 1)
        attention = 2 * blocks * size * 2 * size * dim
        return 2 * batch * (self.shape.num_kv_heads * (scores + mixture) + self.shape.num_heads * attention)

    def state_size(self, key_length: int) -> int:
        """The whole cache: any past block may be sorted to the next one."""
        return self.kv_cache_size(key_length)


def sinkhorn(scores: Tensor, allowed: Tensor, num_iterations: int, causal: bool) -> Tensor:
    """Sinkhorn balancing in logarithms (Sinkhorn and Knopp; the paper's section 3).

    Args:
        scores: `(..., blocks, blocks)`, already divided by the temperature.
        allowed: Bool, broadcastable to `scores`.
        num_iterations: Of rows and then columns.
        causal: Columns are summed up to each row only, and rows are normalised once more at the end.

    Returns: as `scores`, zero where not allowed.
    """
    log = scores.masked_fill(~allowed, HIDDEN)

    def less(total: Tensor) -> Tensor:
        return (log - total).masked_fill(~allowed, HIDDEN)

    for _ in range(num_iterations):
        log = less(log.logsumexp(-1, keepdim=True))
        log = less(log.logcumsumexp(-2) if causal else log.logsumexp(-2, keepdim=True))
    if causal:
        log = less(log.logsumexp(-1, keepdim=True))
    return log.exp().masked_fill(~allowed, 0.0)


def sorted_attention(
    q: Tensor, k: Tensor, v: Tensor, sorting: Tensor, real: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the own block and the sorted one, the sorting given.

    Args:
        q: `(batch, heads, blocks, block, head_dim)`.
        k: `(batch, kv_heads, blocks, block, head_dim)`, zeros where there is none.
        v: As `k`.
        sorting: S, `(batch, kv_heads, blocks, blocks)`.
        real: Bool `(batch, blocks, block)`.
        causal: Hide later places of the own block.
        scale: Factor on q . k.

    Returns: as `q`; and int64 `(batch, kv_heads, blocks, block)`, how many keys each query was compared with.
    """
    # Share of each sorted place that is real tokens: 1 except where a partly filled last block is sorted in.
    whole = sorting.sum(-1, keepdim=True)
    share = sorting @ real[:, None].to(sorting.dtype).expand(-1, k.shape[1], -1, -1)
    share = share / whole.masked_fill(whole == 0, 1.0)  # (batch, kv_heads, blocks, block)
    present = share > LEAST_SHARE
    share = share.masked_fill(~present, 1.0)
    mixed = [(sorting @ x.flatten(3)).view_as(x) / share[..., None] for x in (k, v)]
    keys, values = (torch.cat(pair, 3) for pair in zip(mixed, (k, v), strict=True))

    size, groups = q.shape[3], q.shape[1] // k.shape[1]
    own = real[:, None, :, None, :].expand(-1, k.shape[1], -1, size, -1)
    if causal:
        own = own & torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    allowed = torch.cat([present[..., None, :].expand_as(own), own], -1)  # (batch, kv_heads, blocks, block, 2 block)
    bias = torch.cat([share.log(), torch.zeros_like(share)], -1)[..., None, :]
    # Query heads that share keys stand below one another, so that no key is repeated.
    rows = q.unflatten(1, (-1, groups)).transpose(2, 3).flatten(3, 4)
    logits = (rows @ keys.transpose(-1, -2) * scale + bias).unflatten(3, (groups, size))
    logits = logits.masked_fill(~allowed[:, :, :, None], torch.finfo(q.dtype).min)
    out = logits.softmax(-1).flatten(3, 4) @ values
    return out.unflatten(3, (groups, size)).transpose(2, 3).flatten(1, 2), allowed.sum(-1)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """`(batch, heads, length, d)` with the rows in another order, which may name fewer rows."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """`(batch, heads, length, d)` to `(batch, heads, blocks, size, d)`, filled up with zeros."""
    blocks = ceil_div(x.shape[2], size)
    return pad(x, (0, 0, 0, blocks * size - x.shape[2])).unflatten(2, (blocks, size))
