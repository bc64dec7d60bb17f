"""Sparse Transformer attention (Child et al. 2019, arXiv 1904.10509, section 4) after openai/sparse_attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels import BlockLayout, block_sparse_attention, choose_backend, what_runs
from astbench_kernels.layout import ceil_div
from astbench_registry.configs.sparse import SparseConfig
from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionOutput,
    AttentionShape,
    AttentionStats,
    ExplicitWeights,
)
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.explicit import listed_rows, softmax_rows


class SparseAttention(Attention):
    """A local part and a part that reaches everywhere; l is `stride`, positions are i (query) and j (key).

    "strided" is exact per token: local `i - l < j <= i`, strided `(i - j) mod l = 0` and `j <= i`, the masks
    "local" and "strided" of the published `get_attn_mask`. Tokens lie in a grid with rows of l: the local part
    looks at neighbouring rows, the strided part along a column. Section 4.3 has one local key more, `j >= i - l`.

    "fixed" is exact per block, as in the published kernels: own window (`j div l = i div l`) and, of every window
    up to the query's, the `vertsize` blocks of the head's set (set s: blocks b - (s + 1) vertsize onwards of a
    window of b; c = `vertsize` x `block_size`), causal per token.

    Differences: the published code wants lengths that are multiples of l, and `num_verts` to divide the heads.
    Bidirectional attention, which the paper does not have, is the symmetric form: `|i - j| < l`, `(i - j) mod l = 0`
    on both sides; for "fixed" the whole own window and the summary blocks of all windows.
    Windows, grids and summaries are cut at positions counted from a sequence's first real token.
    "interleaved" is the paper's eq. 6, "merged" eq. 7, "split" eq. 8 with one part a head.
    """

    config: SparseConfig
    block_sparse = True

    def __init__(self, config: SparseConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self._layout: tuple[object, BlockLayout] | None = None  # the last one built, and what for

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
        """See the base class. Time O(N (l + N / l)); "strided" keeps that many weights, "fixed" none."""
        scale = self.shape.head_dim**-0.5 if scale is None else scale
        collect_stats = context is not None and context.collect_stats
        # A grid is a waste for the few rows of a decoding step; the kernel reads exactly the listed keys.
        listed = self.config.pattern == "fixed" or mask.query_offset > 0
        layout = self.layout(q, k, mask) if listed or collect_stats else None
        q, k, v = mask.without_padding(q, k, v)
        if listed:
            assert layout is not None, "built above"
            backend = choose_backend(
                self.config.backend, q.device, dtype=q.dtype, head_dim=max(q.shape[-1], v.shape[-1])
            )
            out, _ = block_sparse_attention(
                q, k, v, layout, scale=scale, causal=mask.causal, key_valid=mask.key_valid, backend=backend
            )
            if collect_stats:
                backend = what_runs(backend, q, k, v, layout, causal=mask.causal, key_valid=mask.key_valid)
        else:
            backend = "torch"
            out = self._by_grid(q, k, v, mask, scale)
        return AttentionOutput(out, stats=self._stats(q, k, mask, layout, backend) if collect_stats else None)

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
        """See the base class; the pattern by its lists, also where :meth:`forward` works on a grid."""
        layout = self.layout(q, k, mask)
        wanted = context is not None and context.collect_stats
        stats = self._stats(q, k, mask, layout, "torch") if wanted else None
        return ExplicitWeights(softmax_rows(q, k, mask, scale, listed_rows(layout, q.shape[1])), stats)

    def parts(self) -> list[tuple[slice, tuple[str, ...]]]:
        """Which heads see which parts of the strided pattern."""
        if self.config.heads == "merged":
            return [(slice(None), ("local", "strided"))]
        if self.config.heads == "split":
            return [(slice(0, None, 2), ("local",)), (slice(1, None, 2), ("strided",))]
        return [(slice(None), ("local", "strided")[self.shape.layer_index % 2 :][:1])]

    def _by_grid(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        stride = min(self.config.stride, k.shape[2])
        # The copies of the keys are small beside the weights.
        queries, keys, values = (in_rows(x.repeat_interleave(q.shape[1] // x.shape[1], 1), stride) for x in (q, k, v))
        valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)
        valid = in_rows((valid if mask.key_valid is None else mask.key_valid)[:, None, :, None], stride)[..., 0]
        out = queries.new_empty(*queries.shape[:-1], v.shape[-1])
        for heads, parts in self.parts():
            query, key, value = queries[:, heads], keys[:, heads], values[:, heads]
            out[:, heads] = _attend(query, key, value, valid, parts, mask.causal, scale)
        return out.flatten(2, 3)[:, :, : q.shape[2]]

    # ----- the pattern as lists

    def layout(self, q: Tensor, k: Tensor, mask: AttentionMask) -> BlockLayout:
        """The pattern as lists of blocks ("strided": of single tokens), built once for each size."""
        what = (q.shape[2], k.shape[2], mask.query_offset, mask.causal, q.device)
        if self._layout is None or self._layout[0] != what:
            build = self._fixed_layout if self.config.pattern == "fixed" else self._strided_layout
            self._layout = (what, build(*what))
        return _for_batch(self._layout[1], q.shape[0])

    def _fixed_layout(
        self, query_length: int, key_length: int, offset: int, causal: bool, device: torch.device
    ) -> BlockLayout:
        config = self.config
        size, window = config.block_size, config.stride // config.block_size
        group = torch.arange(offset // size, ceil_div(offset + query_length, size), device=device)[:, None]
        block = torch.arange(ceil_div(key_length, size), device=device)
        own = group // window == block // window
        # Counted from the end of the window: set 0 is its last `vertsize` blocks.
        sets = (window - 1 - block % window) // config.vertsize
        head = torch.arange(self.shape.num_heads, device=device)[:, None, None] % config.num_verts
        keep = own | (sets == head)
        if causal:
            keep = keep & (block <= group)
        return BlockLayout.from_mask(
            keep[None],
            block_size=size,
            query_group=size,
            query_length=query_length,
            key_length=key_length,
            query_offset=offset,
        )

    def _strided_layout(
        self, query_length: int, key_length: int, offset: int, causal: bool, device: torch.device
    ) -> BlockLayout:
        stride = min(self.config.stride, key_length)
        row = torch.arange(query_length, device=device)[:, None] + offset
        near = row + torch.arange(1 - stride, 1 if causal else stride, device=device)
        far = row % stride + torch.arange(0, key_length, stride, device=device)
        lists = []
        for _, parts in self.parts():
            # A query is in its own column; where both parts are read it counts once.
            column = far.masked_fill(far == row, -1) if len(parts) == 2 else far
            index = torch.cat([{"local": near, "strided": column}[part] for part in parts], 1)
            outside = (index < 0) | (index >= key_length)
            lists.append(index.masked_fill(outside | ((index > row) & causal), key_length))
        width = max(x.shape[1] for x in lists)
        tokens = torch.stack([pad(x, (0, width - x.shape[1]), value=key_length) for x in lists]).sort(-1).values
        if len(lists) > 1:
            tokens = tokens[torch.arange(self.shape.num_heads, device=device) % 2]
        counts = (tokens < key_length).sum(-1, dtype=torch.int32)[None]
        return BlockLayout(tokens.to(torch.int32)[None], counts, 1, 1, query_length, key_length, offset)

    def _stats(
        self, q: Tensor, k: Tensor, mask: AttentionMask, layout: BlockLayout | None, backend: str
    ) -> AttentionStats:
        assert layout is not None, "built when statistics are wanted"
        attended = layout.attended_pairs(causal=mask.causal, key_valid=mask.key_valid).expand(-1, q.shape[1])
        return AttentionStats(attended, mask.visible_pairs(q, k), backend, layout)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two matmuls: over the pairs that lists name ("fixed", and decoding), or over the grid's neighbours."""
        config, heads = self.config, self.shape.num_heads
        if config.pattern == "fixed" or mask.query_offset > 0:
            build = self._fixed_layout if config.pattern == "fixed" else self._strided_layout
            layout = build(query_length, key_length, mask.query_offset, mask.causal, torch.device("cpu"))
            pairs = int(_for_batch(layout, batch).attended_pairs(causal=mask.causal).sum())
            return 4 * pairs * heads // layout.indices.shape[1] * self.shape.head_dim
        stride = min(config.stride, key_length)
        query_rows, key_rows = ceil_div(query_length, stride), ceil_div(key_length, stride)
        reach = {"local": (2 if mask.causal else 3) * stride, "strided": key_rows}
        keys = sum(reach[part] * len(range(heads)[which]) for which, parts in self.parts() for part in parts)
        return 4 * batch * keys * query_rows * stride * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The KV cache: every key is read again, by later queries of its column or as a summary."""
        return self.kv_cache_size(key_length)


def _for_batch(layout: BlockLayout, batch: int) -> BlockLayout:
    """One sequence's lists for each of `batch`."""
    return replace(layout, indices=layout.indices.expand(batch, -1, -1, -1), counts=layout.counts.expand(batch, -1, -1))


def in_rows(x: Tensor, stride: int) -> Tensor:
    """`(batch, heads, length, d)` -> `(batch, heads, rows, stride, d)`, zeros behind the end."""
    rows = ceil_div(x.shape[2], stride)
    return pad(x, (0, 0, 0, rows * stride - x.shape[2])).unflatten(2, (rows, stride))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, parts: tuple[str, ...], causal: bool, scale: float
) -> Tensor:
    """Softmax over the parts together; all tensors as rows of tokens, `valid` `(batch or 1, 1, rows, stride)`."""
    rows, stride = k.shape[2:4]
    wide = torch.promote_types(q.dtype, torch.float32)  # half precision would round logits and weights
    q, k, v = q.to(wide) * scale, k.to(wide), v.to(wide)
    row = torch.arange(rows, device=q.device)
    column = torch.arange(stride, device=q.device)
    logits, allowed = [], []
    if "local" in parts:
        sides = (-1, 0) if causal else (-1, 0, 1)
        distance = (column + torch.tensor(sides, device=q.device)[:, None] * stride).flatten() - column[:, None]
        near = (distance > -stride) & ((distance <= 0) if causal else (distance < stride))  # (stride, reach)
        logits.append(q @ _neighbours(k, sides).transpose(-1, -2))
        seen = _neighbours(valid.unsqueeze(-1), sides).squeeze(-1)
        allowed.append(near & seen.unsqueeze(3))
    if "strided" in parts:
        logits.append((q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2)).transpose(2, 3))
        along = (row <= row[:, None]) if causal else (row == row)[:, None].expand(rows, rows)
        if "local" in parts:
            along = along & (row != row[:, None])  # the query's own position is among the local ones
        allowed.append(along[:, None] & valid.transpose(2, 3).unsqueeze(2))
    shape = torch.broadcast_shapes(*(x.shape[:-1] for x in allowed))
    hidden = ~torch.cat([x.expand(*shape, -1) for x in allowed], -1)
    every = torch.cat(logits, -1)
    weights = every.masked_fill(hidden, torch.finfo(every.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
    pieces = dict(zip(parts, weights.split([x.shape[-1] for x in logits], -1), strict=True))
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    if "local" in parts:
        out = out + pieces["local"] @ _neighbours(v, sides)
    if "strided" in parts:
        out = out + (pieces["strided"].transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)
    return out


def _neighbours(x: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Rows before, at and after each row: `(b, h, rows, stride, d)` -> `(b, h, rows, len(sides) * stride, d)`."""
    rows = x.shape[2]
    wide = pad(x, (0, 0, 0, 0, 1, 1))
    return torch.cat([wide[:, :, 1 + side : 1 + side + rows] for side in sides], 3)
