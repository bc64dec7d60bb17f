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

    slots: Tensor  # bool (n, groups, width)
    listed: Tensor  # int32 (n, groups, width): blocks; in empty slots the one behind the last
    bias: Tensor | None  # (n, groups, width): in powers of two; None for none
    future: Tensor | None  # bool (groups * rows, keys): what causality hides; None without
    unseen: Tensor | None  # bool (batch * kv_heads, keys): what padding hides; None without
    table: Tensor  # int64 (n,): the batch row and key/value head of each list

    def hide(self, logits: Tensor, lists: slice) -> Tensor:
        """Add the bias to `(lists, groups * rows, keys)`, in place, and -inf to what may not be seen."""
        listed, blocks = self.listed[lists].long(), self.layout.num_blocks
        bias = logits.new_full((*listed.shape[:2], blocks + 1), -torch.inf)
        if self.bias is None:
            bias.scatter_(-1, listed, 0.0)
        else:
            bias.scatter_(-1, listed, self.bias[lists])
        logits.view(len(logits), -1, self.rows, blocks, self.layout.block_size).add_(bias[:, :, None, :-1, None])
        if self.future is not None:
            logits.masked_fill_(self.future, -torch.inf)
        if self.unseen is not None:
            logits.masked_fill_(self.unseen[self.table[lists], None, :], -torch.inf)
        return logits

    def bias_gradient(self, d_logits: Tensor, lists: slice) -> Tensor:
        """`(lists, groups, width)`: of the bias, from `(lists, groups * rows, keys)`."""
        tiles = d_logits.view(len(d_logits), -1, self.rows, self.layout.num_blocks, self.layout.block_size)
        listed = self.listed[lists].long().clamp(max=self.layout.num_blocks - 1)
        return tiles.sum((2, 4)).gather(-1, listed).masked_fill_(~self.slots[lists], 0.0)

    def chunks(self) -> Iterator[slice]:
        """Lists whose logits stay in cache together."""
        layout = self.layout
        pairs = layout.num_groups * self.rows * layout.num_blocks * layout.block_size
        step = max(1, dispatch.CHUNK_BYTES // (4 * pairs))
        for start in range(0, len(self.table), step):
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
        d_out = to_units(grads[0], masks).to(queries.dtype).reshape_as(out)
        # d logits = P * (dO V^T - delta + d lse), delta = rowsum(dO * O)
        shift = (d_out * out).sum(-1, keepdim=True) - to_units(grads[1].unsqueeze(-1), masks).reshape_as(lse)
        known_lse = lse.masked_fill(lse == -torch.inf, 0.0)  # rows that see nothing: exp(-inf - 0) = 0
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        d_bias = None if masks.bias is None else torch.empty_like(masks.bias)
        for lists in masks.chunks():
            table = masks.table[lists]
            key = keys[table]
            weights = masks.hide(torch.bmm(queries[lists], key.transpose(1, 2)), lists)
            weights.sub_(known_lse[lists]).exp2_()
            d_values.index_add_(0, table, torch.bmm(weights.transpose(1, 2), d_out[lists]))
            d_logits = torch.bmm(d_out[lists], values[table].transpose(1, 2)).sub_(shift[lists]).mul_(weights)
            if d_bias is not None:
                d_bias[lists] = masks.bias_gradient(d_logits, lists)
            torch.bmm(d_logits, key, out=d_queries[lists])
            d_keys.index_add_(0, table, torch.bmm(d_logits.transpose(1, 2), queries[lists]))
        size = layout.num_blocks, -1
        return (
            from_units(d_queries.mul_(scale).view(-1, masks.rows, q.shape[-1]), masks).to(q.dtype),
            from_blocks(d_keys.div_(LOG2_E).unflatten(1, size).flatten(0, 1).flatten(1), k, key_valid),
            from_blocks(d_values.unflatten(1, size).flatten(0, 1).flatten(1), v, key_valid),
            None if block_bias is None or d_bias is None else d_bias.view_as(block_bias).to(block_bias.dtype),
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
    return queries.reshape(len(masks.table), -1, q.shape[-1]), keys, values


def _masks(
    q: Tensor, k: Tensor, block_bias: Tensor | None, layout: BlockLayout, causal: bool, key_valid: Tensor | None
) -> _Masks:
    batch, lists = layout.indices.shape[:2]
    kv_heads, device = k.shape[1], q.device
    compute = torch.promote_types(q.dtype, torch.float32)
    slots = layout.slots.flatten(0, 1)
    bias = None if block_bias is None else block_bias.detach().to(compute).flatten(0, 1) * LOG2_E
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
        slots=slots,
        listed=layout.indices.flatten(0, 1).masked_fill(~slots, layout.num_blocks),
        bias=bias,
        future=future,
        unseen=None if unseen is None else unseen.view(batch * kv_heads, -1),
        table=(row + torch.arange(lists, device=device) * kv_heads // lists).flatten(),
    )
