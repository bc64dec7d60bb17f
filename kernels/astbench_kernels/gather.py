"""Block-sparse attention by gathering: for each query group, copy its key blocks together, then two matmuls.

Plain torch on any device, written for the CPU, where a few MB of gathered keys stay in cache. The backward pass
gathers again instead of saving the copies: autograd through the gather would keep `1/density` times the memory
of the keys for every group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astbench_kernels.layout import BlockLayout, ceil_div

CHUNK_BYTES = 2 * 2**20
"""Gathered keys held at a time; 1-4 MB is the flat bottom of the curve on the CPUs measured."""


@dataclass
class _Plan:
    """Everything about a call but the tensors that need gradients."""

    layout: BlockLayout
    scale: float
    causal: bool
    batch: int
    kv_heads: int
    heads_per_list: int
    blocks: Tensor  # int64 (units, width): rows of the flat block table; unit = (batch, list head, group)
    slots: Tensor  # bool (units, width)
    counts: list[int]
    key_positions: Tensor  # int64 (units, width): position of each listed block's first key
    row_positions: Tensor  # int64 (groups, rows): position of each query row of a unit
    valid: Tensor | None  # bool (batch * kv_heads * blocks, block_size), None where every key may be seen

    @property
    def rows(self) -> int:
        return self.heads_per_list * self.layout.query_group

    def chunks(self, bytes_per_key: int) -> Iterator[tuple[slice, int]]:
        """See :func:`_chunks`."""
        return _chunks(self.counts, self.layout.block_size * bytes_per_key)

    def addend(self, units: slice, width: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What is added to the logits, `(units, rows or 1, width * block_size)`: bias, or -inf on unseen pairs."""
        size = self.layout.block_size
        position = self.key_positions[units, :width, None] + torch.arange(size, device=self.blocks.device)
        hidden = ~self.slots[units, :width, None] | (position >= self.layout.key_length)
        if self.valid is not None:
            hidden |= ~self.valid[self.blocks[units, :width]]
        if bias is None:
            addend = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        else:
            addend = bias[units, :width, None].expand(hidden.shape).clone()
        addend = addend.masked_fill_(hidden, -torch.inf).flatten(1).unsqueeze(1)
        if self.causal:
            groups = torch.arange(units.start, units.stop, device=position.device) % self.layout.num_groups
            rows = self.row_positions[groups]  # (units, rows)
            addend = addend.masked_fill(position.flatten(1).unsqueeze(1) > rows.unsqueeze(-1), -torch.inf)
        return addend


def _chunks(counts: list[int], bytes_per_block: int) -> Iterator[tuple[slice, int]]:
    """Runs of units with the width of the longest list among them; units without keys are left out."""
    start = 0
    while start < len(counts):
        width, stop = counts[start], start + 1
        while stop < len(counts):
            wider = max(width, counts[stop])
            if (stop + 1 - start) * wider * bytes_per_block > CHUNK_BYTES:
                break
            width, stop = wider, stop + 1
        if width > 0:
            yield slice(start, stop), width
        start = stop


def gathered_pairs(layout: BlockLayout, num_heads: int, num_kv_heads: int, bytes_per_key: int) -> int:
    """(query, key) pairs that :func:`gather_attention` computes: each chunk's lists as long as its longest one.

    Args:
        layout: The lists.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        bytes_per_key: Of one key of one head; the longer, the shorter the chunks.
    """
    layout = _one_list_per_kv_head(layout, num_heads, num_kv_heads)
    rows = num_heads // layout.indices.shape[1] * layout.query_group
    chunks = _chunks(layout.counts.flatten().tolist(), layout.block_size * bytes_per_key)
    blocks = sum((units.stop - units.start) * width for units, width in chunks)
    return blocks * layout.block_size * rows


def _one_list_per_kv_head(layout: BlockLayout, num_heads: int, num_kv_heads: int) -> BlockLayout:
    """At least; the layout itself when it has one per query head."""
    return layout if layout.indices.shape[1] in (num_kv_heads, num_heads) else layout.expand_heads(num_kv_heads)


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    block_bias: Tensor | None,
    scale: float,
    causal: bool,
    key_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`.

    Cost: O(N x width x block_size) time; beside inputs and outputs O(CHUNK_BYTES) memory, in both directions.
    """
    layout = _one_list_per_kv_head(layout, q.shape[1], k.shape[1])
    if block_bias is not None and block_bias.shape[1] != layout.indices.shape[1]:
        block_bias = block_bias.repeat_interleave(layout.indices.shape[1] // block_bias.shape[1], 1)
    out, lse = _GatherAttention.apply(q, k, v, block_bias, layout, scale, causal, key_valid)
    return out, lse


def _plan(q: Tensor, k: Tensor, layout: BlockLayout, scale: float, causal: bool, key_valid: Tensor | None) -> _Plan:
    batch, num_heads, _, _ = q.shape
    kv_heads, lists, groups = k.shape[1], layout.indices.shape[1], layout.num_groups
    width = layout.indices.shape[-1]
    slots = layout.slots.reshape(-1, width)
    listed = layout.indices.long().masked_fill(~layout.slots, 0)
    kv_head_of_list = torch.arange(lists, device=q.device) * kv_heads // lists
    row = torch.arange(batch, device=q.device)[:, None] * kv_heads + kv_head_of_list
    first = (layout.first_group + torch.arange(groups, device=q.device)) * layout.query_group
    rows = first[:, None] + torch.arange(layout.query_group, device=q.device)
    valid = None
    if key_valid is not None:
        padded = torch.nn.functional.pad(key_valid, (0, layout.num_blocks * layout.block_size - layout.key_length))
        valid = padded.view(batch, 1, layout.num_blocks, layout.block_size).expand(-1, kv_heads, -1, -1)
        valid = valid.reshape(-1, layout.block_size)
    return _Plan(
        layout=layout,
        scale=scale,
        causal=causal,
        batch=batch,
        kv_heads=kv_heads,
        heads_per_list=num_heads // lists,
        blocks=(listed + row[:, :, None, None] * layout.num_blocks).reshape(-1, width),
        slots=slots,
        counts=layout.counts.flatten().tolist(),
        key_positions=(listed * layout.block_size).reshape(-1, width),
        row_positions=rows.repeat(1, num_heads // lists),
        valid=valid,
    )


def _to_units(x: Tensor, plan: _Plan) -> Tensor:
    """`(batch, heads, query_length, d)` -> `(units, rows, d)`, zeros where a group sticks out of the queries."""
    layout, lists = plan.layout, plan.layout.indices.shape[1]
    lead = layout.query_offset % layout.query_group
    tail = layout.num_groups * layout.query_group - lead - layout.query_length
    x = torch.nn.functional.pad(x, (0, 0, lead, tail))
    x = x.view(plan.batch, lists, plan.heads_per_list, layout.num_groups, layout.query_group, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, plan.rows, x.shape[-1])


def _from_units(x: Tensor, plan: _Plan) -> Tensor:
    """The inverse of :func:`_to_units`."""
    layout, lists = plan.layout, plan.layout.indices.shape[1]
    lead = layout.query_offset % layout.query_group
    x = x.view(plan.batch, lists, layout.num_groups, plan.heads_per_list, layout.query_group, x.shape[-1])
    x = x.transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return x[:, :, lead : lead + layout.query_length]


def _to_blocks(x: Tensor, key_valid: Tensor | None, plan: _Plan) -> Tensor:
    """`(batch, kv_heads, key_length, d)` -> `(batch * kv_heads * blocks, block_size * d)`, unseen keys zeroed."""
    layout = plan.layout
    if key_valid is not None:
        # Padding may hold NaN; a zero weight would keep it.
        x = x.masked_fill(~key_valid[:, None, :, None], 0.0)
    x = torch.nn.functional.pad(x, (0, 0, 0, layout.num_blocks * layout.block_size - layout.key_length))
    return x.reshape(-1, layout.block_size * x.shape[-1])


class _GatherAttention(torch.autograd.Function):
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
        plan = _plan(q, k, layout, scale, causal, key_valid)
        compute = torch.promote_types(q.dtype, torch.float32)
        queries = _to_units(q, plan)
        keys, values = _to_blocks(k, key_valid, plan), _to_blocks(v, key_valid, plan)
        bias = None if block_bias is None else block_bias.detach().flatten(0, 2).to(compute)
        out = queries.new_zeros(len(queries), plan.rows, v.shape[-1], dtype=compute)
        lse = torch.full(queries.shape[:2], -torch.inf, dtype=compute, device=q.device)
        for units, width in plan.chunks(k.shape[-1] * k.element_size()):
            index = plan.blocks[units, :width].reshape(-1)
            count = units.stop - units.start
            key = keys.index_select(0, index).view(count, -1, k.shape[-1])
            weights = _logits(queries[units], key, plan.addend(units, width, bias, compute), scale)
            # Rows that see nothing: weights 0, log-sum-exp log 0 = -inf; no NaN on the way.
            highest = weights.amax(-1, keepdim=True)
            highest.masked_fill_(highest == -torch.inf, 0.0)
            weights.sub_(highest).exp_()
            total = weights.sum(-1, keepdim=True)
            lse[units] = (highest + total.log()).squeeze(-1)
            weights.div_(total.clamp_(min=torch.finfo(compute).tiny))
            value = values.index_select(0, index).view(count, -1, v.shape[-1])
            torch.bmm(weights, value.to(compute), out=out[units])
        result, lse_rows = _from_units(out, plan).to(q.dtype), _from_units(lse.unsqueeze(-1), plan).squeeze(-1)
        ctx.save_for_backward(q, k, v, block_bias, key_valid, out, lse)
        ctx.plan = plan
        return result, lse_rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        q, k, v, block_bias, key_valid, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        compute = lse.dtype
        queries, d_out = _to_units(q, plan), _to_units(grad_out, plan)
        d_lse = _to_units(grad_lse.unsqueeze(-1), plan)
        keys, values = _to_blocks(k, key_valid, plan), _to_blocks(v, key_valid, plan)
        bias = None if block_bias is None else block_bias.flatten(0, 2).to(compute)
        d_queries = torch.zeros_like(queries)
        # Many groups add to one block: sum in float32 whatever the inputs are.
        d_keys, d_values = torch.zeros_like(keys, dtype=compute), torch.zeros_like(values, dtype=compute)
        d_bias = None if bias is None else torch.zeros_like(bias)
        # d logits = P * (dP - delta + d lse), delta = rowsum(dO * O)
        shift = (d_out.to(compute) * out).sum(-1, keepdim=True) - d_lse
        known_lse = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)  # rows that see nothing: exp(-inf - 0) = 0
        size = plan.layout.block_size
        for units, width in plan.chunks(k.shape[-1] * k.element_size()):
            index = plan.blocks[units, :width].reshape(-1)
            count = units.stop - units.start
            key = keys.index_select(0, index).view(count, -1, k.shape[-1])
            weights = _logits(queries[units], key, plan.addend(units, width, bias, compute), plan.scale)
            weights.sub_(known_lse[units]).exp_()
            value = values.index_select(0, index).view(count, -1, v.shape[-1])
            d_value = torch.bmm(weights.to(v.dtype).transpose(1, 2), d_out[units])
            d_values.index_add_(0, index, d_value.view(len(index), -1).to(compute))
            d_logits = torch.bmm(d_out[units], value.transpose(1, 2)).to(compute)
            d_logits.sub_(shift[units]).mul_(weights)
            if d_bias is not None:
                d_bias[units, :width] = d_logits.view(count, plan.rows, width, size).sum((1, 3))
            d_logits = d_logits.mul_(plan.scale).to(q.dtype)
            torch.bmm(d_logits, key, out=d_queries[units])
            d_key = torch.bmm(d_logits.transpose(1, 2), queries[units])
            d_keys.index_add_(0, index, d_key.view(len(index), -1).to(compute))
        return (
            _from_units(d_queries, plan),
            _from_blocks(d_keys, k, key_valid),
            _from_blocks(d_values, v, key_valid),
            None if d_bias is None else d_bias.view_as(block_bias).to(block_bias.dtype),
            None,
            None,
            None,
            None,
        )


def _logits(queries: Tensor, key: Tensor, addend: Tensor, scale: float) -> Tensor:
    """`(units, rows, keys)` in the dtype of `addend`: a product in half precision would round the logits."""
    queries, key = queries.to(addend.dtype), key.to(addend.dtype)
    return torch.baddbmm(addend, queries, key.transpose(1, 2), alpha=scale)


def _from_blocks(x: Tensor, like: Tensor, key_valid: Tensor | None) -> Tensor:
    """The inverse of :func:`_to_blocks`, in the dtype of `like`; padding gets no gradient."""
    batch, heads, length, dim = like.shape
    size = x.shape[1] // dim
    x = x.view(batch, heads, ceil_div(length, size) * size, dim)[:, :, :length].to(like.dtype)
    return x if key_valid is None else x.masked_fill(~key_valid[:, None, :, None], 0.0)
