"""Block-sparse attention by gathering: for each query group, copy its key blocks together, then two matmuls.

Lists that few rows share go the other way round: see `key_major.py`. Where leaving products
out costs more than it saves, none are: see `masked.py`. A decoding step has its own: see `one_row.py`.

Plain torch on any device, written for the CPU, where a few MB of gathered keys stay in cache. The backward pass
gathers again instead of saving the copies: autograd through the gather would keep `1/density` times the memory
of the keys for every group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from astbench_kernels.arguments import wants_gradients
from astbench_kernels.backends.cpu.fused import fused_units, serves
from astbench_kernels.backends.cpu.key_major import KeyMajorAttention
from astbench_kernels.backends.cpu.masked import MaskedAttention
from astbench_kernels.backends.cpu.one_row import is_fused, one_row_attention
from astbench_kernels.backends.cpu.units import (
    LOG2_E,
    ListedUnits,
    Scratch,
    from_blocks,
    from_units,
    in_numbers,
    listed_units,
    lists_together,
    one_list_per_kv_head,
    to_blocks,
    to_units,
)
from astbench_kernels.backends.reference import reference_attention
from astbench_kernels.dispatch import rules
from astbench_kernels.layout import BlockLayout


def schedule_of(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, causal: bool, block_bias: Tensor | None = None
) -> rules.GatherSchedule:
    """Which way a call is computed; see :func:`astbench_kernels.dispatch.gather_schedule`."""
    fused = serves(q, k, v, block_bias) and not wants_gradients(q, k, v, block_bias)
    schedule = _schedule(layout, q.shape[1], k.shape[1], causal, fused=fused)
    if schedule == "masked" and not (_is_finite(k) and _is_finite(v)):
        # In a sum over all keys a weight of 0 would not keep out what no list names.
        return _schedule(layout, q.shape[1], k.shape[1], causal, fused=fused, masked=False)
    if schedule == "whole_row" and not is_fused(q, k, v, block_bias):
        return "one_row"
    return schedule


def _is_finite(x: Tensor) -> bool:
    """False where a sum overflows, too: the other schedules are only slower."""
    return math.isfinite(float(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))))


def _schedule(
    layout: BlockLayout, num_heads: int, num_kv_heads: int, causal: bool, *, fused: bool, masked: bool = True
) -> rules.GatherSchedule:
    layout = one_list_per_kv_head(layout, num_heads, num_kv_heads)
    if layout.query_length == 1:
        width = int(layout.counts.max()) * layout.block_size
        return rules.row_schedule(width, layout.indices.shape[1], num_kv_heads, layout.key_length)
    size, length = layout.block_size, layout.key_length
    rows = rules.rows_per_list(num_heads, num_kv_heads, layout.indices.shape[1], layout.query_group)
    met = int(layout.counts.sum()) * rows / max(1, layout.indices.shape[0] * num_kv_heads * layout.num_blocks)
    query_rows = layout.num_groups * layout.query_group * num_heads // num_kv_heads if masked else 0
    seen = rules.keys_seen(
        layout.query_length, length, layout.query_offset, causal=causal, key_stride=layout.key_stride
    )
    schedule = rules.gather_schedule(rows, size, met, query_rows, length, seen, fused=fused)
    # Key by key, a tile's rows are of many groups, and each would have its own first row: not written, for the groups
    # of carried lists are wide.
    return "query_major" if schedule == "key_major" and layout.since is not None else schedule


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

    Cost: O(N x width x block_size) time, or O(N x M) where that is less; beside inputs and outputs, and copies as large
    as those, O(CHUNK_BYTES) memory, in both directions. For lists that few rows share
    (`key_major.py`) O(CHUNK_ROWS x width), for short sequences times the key/value heads; where all
    pairs are computed (`masked.py`) O(CHUNK_PAIRS), or those of one list.
    """
    if 0 in (q.numel(), k.numel(), v.numel(), layout.indices.numel()):  # nothing to gather
        return reference_attention(
            q, k, v, layout, block_bias=block_bias, scale=scale, causal=causal, key_valid=key_valid
        )
    layout = one_list_per_kv_head(layout, q.shape[1], k.shape[1])
    if block_bias is not None and block_bias.shape[1] != layout.indices.shape[1]:
        block_bias = block_bias.repeat_interleave(layout.indices.shape[1] // block_bias.shape[1], 1)
    schedule = schedule_of(q, k, v, layout, causal=causal, block_bias=block_bias)
    if schedule in ("one_row", "whole_row"):
        return one_row_attention(q, k, v, block_bias, layout, scale, causal, key_valid, whole=schedule == "whole_row")
    out, lse = _SCHEDULES[schedule].apply(q, k, v, block_bias, layout, scale, causal, key_valid)
    return out, lse


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
        plan = listed_units(q, k, layout, scale, causal, key_valid)
        queries, keys, values = to_units(q, plan), to_blocks(k, key_valid, layout), to_blocks(v, key_valid, layout)
        if serves(q, k, v, block_bias):
            out, lse = fused_units(queries, keys, values, plan)
            spoilt = _not_finite(keys, plan)
            if bool(spoilt.any()):
                found = _forward_in_steps(queries, keys, values, plan, block_bias)
                out = torch.where(spoilt[:, None, None], found[0].to(out.dtype), out)
                lse = torch.where(spoilt[:, None], found[1], lse)
        else:
            out, lse = _forward_in_steps(queries, keys, values, plan, block_bias)
        ctx.save_for_backward(q, k, v, block_bias, key_valid, out, lse)
        ctx.plan = plan
        return from_units(out, plan).to(q.dtype), from_units(lse.unsqueeze(-1), plan).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        q, k, v, block_bias, key_valid, out, lse = ctx.saved_tensors
        plan: ListedUnits = ctx.plan
        compute = lse.dtype
        queries, d_out, d_lse = (
            to_units(x, plan)[plan.order].to(compute) for x in (q, grad_out, grad_lse.unsqueeze(-1))
        )
        queries.mul_(plan.scale * LOG2_E)
        keys, values = to_blocks(k, key_valid, plan.layout), to_blocks(v, key_valid, plan.layout)
        bias = _bias_of(block_bias, plan, compute)
        d_queries = torch.zeros_like(queries)
        # Many groups add to one block: sum in float32 whatever the inputs are.
        d_keys, d_values = torch.zeros_like(keys, dtype=compute), torch.zeros_like(values, dtype=compute)
        d_bias = None if bias is None else torch.zeros_like(bias)
        # d logits = P * (dP - delta + d lse), delta = rowsum(dO * O) = rowsum(dP * P)
        out = out[plan.order] if out.dtype == compute else None
        shift = -d_lse if out is None else (d_out * out).sum(-1, keepdim=True) - d_lse
        lse = lse[plan.order] * LOG2_E
        known_lse = lse.masked_fill_(lse == -torch.inf, 0.0).unsqueeze(-1)  # rows that see nothing: exp(-inf - 0) = 0
        scratch = Scratch(queries)
        for units, width in _chunks_of(plan, keys):
            index = plan.blocks[units, :width].reshape(-1)
            key = scratch.gather("key", keys, index, units, k.shape[-1])
            weights = _logits(queries[units], key, plan, units, width, bias, scratch)
            weights.sub_(known_lse[units]).exp2_()
            d_value = scratch.bmm("product", weights.transpose(1, 2), d_out[units])
            d_values.index_add_(0, index, d_value.view(len(index), -1))
            value = scratch.gather("value", values, index, units, v.shape[-1])
            d_logits = scratch.bmm("d_logits", d_out[units], value.transpose(1, 2))
            if out is None:  # it was rounded: gradients would be several times as far off
                delta = d_logits.mul_(weights).sum(-1, keepdim=True).add_(shift[units])
                d_logits.addcmul_(weights, delta, value=-1)
            else:
                d_logits.sub_(shift[units]).mul_(weights)
            if d_bias is not None:
                d_bias[units, :width] = d_logits.sum(1).view(-1, width, plan.layout.block_size).sum(-1)
            torch.bmm(d_logits, key, out=d_queries[units])
            d_key = scratch.bmm("product", d_logits.transpose(1, 2), queries[units])
            d_keys.index_add_(0, index, d_key.view(len(index), -1))
        return (
            from_units(in_numbers(d_queries.mul_(plan.scale), plan), plan).to(q.dtype),
            from_blocks(d_keys.div_(LOG2_E), k, key_valid),  # the queries above hold scale * LOG2_E
            from_blocks(d_values, v, key_valid),
            None if d_bias is None else _bias_gradient(d_bias, plan).view_as(block_bias).to(block_bias.dtype),
            None,
            None,
            None,
            None,
        )


_SCHEDULES: dict[rules.GatherSchedule, type[torch.autograd.Function]] = {
    "query_major": _GatherAttention,
    "key_major": KeyMajorAttention,
    "masked": MaskedAttention,
}


def _not_finite(keys: Tensor, plan: ListedUnits) -> Tensor:
    """Bool `(units,)`: lists with keys that a mask, which is added, would not hide from rows that may not see them."""
    sums = keys.sum(1, dtype=torch.promote_types(keys.dtype, torch.float32))
    return in_numbers((~sums.isfinite())[plan.blocks].any(1), plan)


def _forward_in_steps(
    queries: Tensor, keys: Tensor, values: Tensor, plan: ListedUnits, block_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`fused_units`, both in float32 or more, with a bias, for values of any size and on any device."""
    compute = torch.promote_types(queries.dtype, torch.float32)
    queries = queries[plan.order].to(compute).mul_(plan.scale * LOG2_E)
    size = plan.layout.block_size
    dim, value_dim = keys.shape[1] // size, values.shape[1] // size
    bias = _bias_of(block_bias, plan, compute)
    out = queries.new_zeros(len(queries), plan.rows, value_dim)
    lse = torch.full(queries.shape[:2], -torch.inf, dtype=compute, device=queries.device)
    scratch = Scratch(queries)
    for units, width in _chunks_of(plan, keys):
        index = plan.blocks[units, :width].reshape(-1)
        key = scratch.gather("key", keys, index, units, dim)
        weights = _logits(queries[units], key, plan, units, width, bias, scratch)
        # Rows that see nothing: weights 0, log-sum-exp log 0 = -inf; no NaN on the way.
        highest = weights.amax(-1, keepdim=True)
        highest.masked_fill_(highest == -torch.inf, 0.0)
        weights.sub_(highest).exp2_()
        total = weights.sum(-1, keepdim=True)
        lse[units] = (highest + total.log2()).squeeze(-1)
        torch.bmm(weights, scratch.gather("key", values, index, units, value_dim), out=out[units])
        out[units].div_(total.clamp_(min=torch.finfo(compute).tiny))
    return in_numbers(out, plan), in_numbers(lse.div_(LOG2_E), plan)


def _chunks_of(plan: ListedUnits, keys: Tensor) -> Iterator[tuple[slice, int]]:
    return lists_together(plan.counts, keys.shape[1] * keys.element_size(), rules.CHUNK_BYTES)


def _bias_of(block_bias: Tensor | None, plan: ListedUnits, dtype: torch.dtype) -> Tensor | None:
    """`(units, width)`, in powers of two; that of blocks which no row sees may be anything, and is left out."""
    if block_bias is None:
        return None
    bias = plan.in_order(block_bias.detach().flatten(0, 2)).to(dtype) * LOG2_E
    return bias.masked_fill_(plan.since == plan.layout.query_group, 0.0)


def _bias_gradient(d_bias: Tensor, plan: ListedUnits) -> Tensor:
    """As the layout has it."""
    return in_numbers(torch.empty_like(d_bias).scatter_(1, plan.slots, d_bias), plan)


def _logits(
    queries: Tensor, key: Tensor, plan: ListedUnits, units: slice, width: int, bias: Tensor | None, scratch: Scratch
) -> Tensor:
    """`(units, rows, keys)` in powers of two, -inf where a pair may not be seen."""
    logits = scratch.bmm("logits", queries, key.transpose(1, 2))
    tiles = logits.view(len(queries), plan.rows, width, plan.layout.block_size)
    if bias is not None:
        tiles += bias[units, None, :width, None]
    early = plan.too_early(units, width)
    if early is not None:
        rows, first = early
        if plan.layout.since is None:  # a few slots without a block, filled up with one that may hold anything
            tiles[:, :, first:].masked_fill_(rows.unsqueeze(-1), -torch.inf)
        else:  # added, for which there are vector instructions: a tenth of what filling takes
            never = torch.zeros(rows.shape, dtype=logits.dtype, device=logits.device).masked_fill_(rows, -torch.inf)
            tiles[:, :, first:] += never.unsqueeze(-1)
    hidden = plan.hidden(units)
    if hidden is not None:
        tiles[:, :, : hidden.shape[2]].masked_fill_(hidden, -torch.inf)
    return logits
