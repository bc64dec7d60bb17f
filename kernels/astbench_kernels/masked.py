"""Block-sparse attention of short sequences: all pairs, those that no list names masked.

Where sequences are short, leaving work out (:mod:`astbench_kernels.gather`, :mod:`astbench_kernels.key_major`) costs
more than doing it. Nothing here is cheaper than dense attention; memory stays that of a few lists' logits.

Plain torch on any device, written for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astbench_kernels import dispatch
from astbench_kernels.layout import BlockLayout
from astbench_kernels.units import LOG2_E, Units, from_blocks, from_units, to_blocks, to_units, unseen_keys


@dataclass
class _Masks(Units):
    """What a call's lists leave visible; `n` is batch x list heads."""

    bias: Tensor  # (n, groups, blocks): of listed blocks, in powers of two; -inf of all others
    future: Tensor | None  # bool (groups * rows, keys): what causality hides; None without
    unseen: Tensor | None  # bool (batch * kv_heads, keys): what padding hides; None without
    table: Tensor  # int64 (n,): the batch row and key/value head of each list

    def hide(self, logits: Tensor, lists: slice) -> Tensor:
        """Add the bias to `(lists, groups * rows, keys)`, in place, and -inf to what may not be seen."""
        groups, blocks = self.bias.shape[1:]
        tiles = logits.view(len(logits), groups, self.rows, blocks, -1)
        tiles += self.bias[lists, :, None, :, None]
        if self.future is not None:
            logits.masked_fill_(self.future, -torch.inf)
        if self.unseen is not None:
            logits.masked_fill_(self.unseen[self.table[lists], None, :], -torch.inf)
        return logits

    def chunks(self) -> Iterator[slice]:
        """Lists whose logits stay in cache together."""
        groups, blocks = self.bias.shape[1:]
        pairs = groups * self.rows * blocks * self.layout.block_size
        step = max(1, dispatch.CHUNK_BYTES // (pairs * self.bias.element_size()))
        for start in range(0, len(self.bias), step):
            yield slice(start, start + step)


class MaskedAttention(torch.autograd.Function):
    """See :func:`astbench_kernels.gather.gather_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_bias: Tensor | None,
        layout: BlockLayout,
        scale: float,
        causal: bool,
        key_valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        masks = _masks(q, k, block_bias, layout, causal, key_valid)
        queries, keys, values = _inputs(q, k, v, key_valid, masks, scale)
        out = queries.new_empty(*queries.shape[:2], v.shape[-1])
        lse = queries.new_empty(*queries.shape[:2], 1)
        for lists in masks.chunks():
            table = masks.table[lists]
            weights = masks.hide(torch.bmm(queries[lists], keys[table].transpose(1, 2)), lists)
            # Rows that see nothing: weights 0, log-sum-exp log 0 = -inf; no NaN on the way.
            highest = weights.amax(-1, keepdim=True)
            highest.masked_fill_(highest == -torch.inf, 0.0)
            total = weights.sub_(highest).exp2_().sum(-1, keepdim=True)
            torch.add(highest, total.log2(), out=lse[lists])
            torch.bmm(weights, values[table], out=out[lists])
            out[lists].div_(total.clamp_(min=torch.finfo(total.dtype).tiny))
        ctx.save_for_backward(q, k, v, block_bias, key_valid, out, lse)
        ctx.call = layout, scale, causal
        shape = (-1, masks.rows)
        lse = (lse / LOG2_E).view(*shape, 1)
        return from_units(out.view(*shape, v.shape[-1]), masks).to(q.dtype), from_units(lse, masks).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the block bias."""
        q, k, v, block_bias, key_valid, out, lse = ctx.saved_tensors
        layout, scale, causal = ctx.call
        masks = _masks(q, k, block_bias, layout, causal, key_valid)
        queries, keys, values = _inputs(q, k, v, key_valid, masks, scale)
        d_out = to_units(grads[0], masks).to(queries.dtype).view_as(out)
        # d logits = P * (dO V^T - delta + d lse), delta = rowsum(dO * O)
        shift = (d_out * out).sum(-1, keepdim=True) - to_units(grads[1].unsqueeze(-1), masks).view_as(lse)
        known_lse = lse.masked_fill(lse == -torch.inf, 0.0)  # rows that see nothing: exp(-inf - 0) = 0
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        d_table = None if block_bias is None else torch.empty_like(masks.bias)
        for lists in masks.chunks():
            table = masks.table[lists]
            key = keys[table]
            weights = masks.hide(torch.bmm(queries[lists], key.transpose(1, 2)), lists)
            weights.sub_(known_lse[lists]).exp2_()
            d_values.index_add_(0, table, torch.bmm(weights.transpose(1, 2), d_out[lists]))
            d_logits = torch.bmm(d_out[lists], values[table].transpose(1, 2)).sub_(shift[lists]).mul_(weights)
            if d_table is not None:
                tiles = d_logits.view(len(table), d_table.shape[1], masks.rows, d_table.shape[2], -1)
                d_table[lists] = tiles.sum((2, 4))
            torch.bmm(d_logits, key, out=d_queries[lists])
            d_keys.index_add_(0, table, torch.bmm(d_logits.transpose(1, 2), queries[lists]))
        d_bias = None
        if block_bias is not None and d_table is not None:
            given = d_table.view(*block_bias.shape[:3], -1).gather(-1, _listed(layout)).masked_fill_(~layout.slots, 0.0)
            d_bias = given.to(block_bias.dtype)
        size = layout.num_blocks, -1
        return (
            from_units(d_queries.mul_(scale).view(-1, masks.rows, q.shape[-1]), masks).to(q.dtype),
            from_blocks(d_keys.div_(LOG2_E).unflatten(1, size).flatten(0, 1).flatten(1), k, key_valid),
            from_blocks(d_values.unflatten(1, size).flatten(0, 1).flatten(1), v, key_valid),
            d_bias,
            None,
            None,
            None,
            None,
        )


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, masks: _Masks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(n, groups * rows, d)`, times the scale and in powers of two, keys and values `(tables, keys, d)`."""
    compute = torch.promote_types(q.dtype, torch.float32)
    queries = to_units(q, masks).to(compute) * (scale * LOG2_E)
    tables = k.shape[0] * k.shape[1]
    keys, values = (to_blocks(x, key_valid, masks.layout).view(tables, -1, x.shape[-1]).to(compute) for x in (k, v))
    return queries.view(len(masks.table), -1, q.shape[-1]), keys, values


def _listed(layout: BlockLayout) -> Tensor:
    """int64 like `layout.indices`: the block of every slot, 0 in empty ones."""
    return layout.indices.masked_fill(~layout.slots, 0).long()


def _masks(
    q: Tensor, k: Tensor, block_bias: Tensor | None, layout: BlockLayout, causal: bool, key_valid: Tensor | None
) -> _Masks:
    batch, lists, groups, _ = layout.indices.shape
    kv_heads, device = k.shape[1], q.device
    compute = torch.promote_types(q.dtype, torch.float32)
    # One more block, for what empty slots hold.
    bias = torch.full((batch, lists, groups, layout.num_blocks + 1), -torch.inf, dtype=compute, device=device)
    given = torch.zeros((), dtype=compute, device=device).expand(layout.indices.shape)
    if block_bias is not None:
        given = block_bias.detach().to(compute) * LOG2_E
    bias.scatter_(-1, _listed(layout).masked_fill_(~layout.slots, layout.num_blocks), given)
    units = Units(layout, batch, q.shape[1] // lists)
    future = None
    if causal:
        last = units.last_keys(device).repeat(1, units.heads_per_list).flatten()
        future = torch.arange(layout.num_blocks * layout.block_size, device=device) > last.unsqueeze(-1)
    unseen = unseen_keys(layout, batch, kv_heads, key_valid)
    row = torch.arange(batch, device=device)[:, None] * kv_heads
    return _Masks(
        layout=layout,
        batch=batch,
        heads_per_list=units.heads_per_list,
        bias=bias[..., :-1].flatten(0, 1),
        future=future,
        unseen=None if unseen is None else unseen.view(batch * kv_heads, -1),
        table=(row + torch.arange(lists, device=device) * kv_heads // lists).flatten(),
    )
