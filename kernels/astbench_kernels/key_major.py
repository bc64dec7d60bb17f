"""Block-sparse attention key block by key block: gather the query rows that chose it, two matmuls, merge.

The other way round than :mod:`astbench_kernels.gather`, for lists that few rows share (a causal model chooses for
every token by itself). There, gathering each list's own keys would cost more than the work on them; here a tile is as
tall as the number of rows that chose the block, whoever shares their lists. The parts of a row are merged as in online
softmax.

Plain torch on any device, written for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astbench_kernels.layout import BlockLayout
from astbench_kernels.units import LOG2_E, Plan, from_blocks, from_units, make_plan, to_blocks, to_units

TILE_ROWS = 2048
"""Query rows of a tile: its parts stay within a few MB."""


@dataclass
class _Tile:
    """Units that chose one key block, those first that may not see all of it."""

    block: int
    entries: Tensor  # int64 (n,): flat places in the (units, width) lists
    units: Tensor  # int64 (n,)
    hidden: Tensor | None  # bool (the first units, rows or 1, block_size): pairs that may not be seen


class KeyMajorAttention(torch.autograd.Function):
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
        plan = make_plan(q, k, layout, scale, causal, key_valid)
        compute = torch.promote_types(q.dtype, torch.float32)
        keys, values = _table(k, key_valid, plan), _table(v, key_valid, plan)
        bias = None if block_bias is None else block_bias.detach().flatten().to(compute) * LOG2_E
        queries = to_units(q, plan).to(compute) * (scale * LOG2_E)
        # A row's last column is minus its reference, and every key's is 1: the product is the logit less the reference.
        queries = torch.cat([queries, -_references(queries, keys, bias, plan)], -1)
        sums = _weighted_sums(queries, keys, values, bias, plan, follow=False)
        if not bool(sums.isfinite().all()):
            # A logit lies 2^7 powers of two above its row's reference (or the inputs are not finite): once more, with
            # care. Looking at every tile beforehand cost more than a tenth of the work.
            sums = _weighted_sums(queries, keys, values, bias, plan, follow=True)
        total = sums[..., -1:]
        out = sums[..., :-1] / total.clamp(min=torch.finfo(compute).tiny)
        # Rows that see nothing: output 0, log-sum-exp log 0 = -inf.
        lse = (total.log2() - queries[..., -1:]).masked_fill_(total == 0, -torch.inf)
        ctx.save_for_backward(q, k, v, block_bias, key_valid, out, lse)
        ctx.plan = plan
        return from_units(out, plan).to(q.dtype), from_units(lse / LOG2_E, plan).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the block bias."""
        q, k, v, block_bias, key_valid, out, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        compute, dim = lse.dtype, k.shape[-1]
        keys, values = _table(k, key_valid, plan), _table(v, key_valid, plan)
        bias = None if block_bias is None else block_bias.flatten().to(compute) * LOG2_E
        d_out, d_lse = to_units(grads[0], plan).to(compute), to_units(grads[1].unsqueeze(-1), plan)
        known_lse = lse.masked_fill(lse == -torch.inf, 0.0)  # rows that see nothing: exp(-inf - 0) = 0
        queries = torch.cat([to_units(q, plan).to(compute) * (plan.scale * LOG2_E), -known_lse], -1)
        # d logits = P * (dO V^T - delta + d lse), delta = rowsum(dO * O): the last column again.
        d_out = torch.cat([d_out, d_lse - (d_out * out).sum(-1, keepdim=True)], -1)
        d_queries = torch.zeros_like(queries[..., :dim])
        d_keys, d_values = torch.zeros_like(keys[..., :dim]), torch.zeros_like(values[..., :-1])
        d_bias = None if bias is None else torch.zeros_like(bias)
        for tile in _tiles(plan):
            weights = _logits(queries, keys, bias, tile)
            _hide(weights, tile, plan)
            weights.exp2_()
            given = d_out.index_select(0, tile.units).flatten(0, 1)
            d_values[tile.block].addmm_(weights.T, given[:, :-1])
            d_logits = (given @ values[tile.block].T).mul_(weights)
            if d_bias is not None:
                d_bias[tile.entries] = d_logits.view(len(tile.units), -1).sum(-1)
            d_keys[tile.block].addmm_(d_logits.T, queries.index_select(0, tile.units).flatten(0, 1)[:, :dim])
            part = d_queries.index_select(0, tile.units)
            part.flatten(0, 1).addmm_(d_logits, keys[tile.block][:, :dim])
            d_queries.index_copy_(0, tile.units, part)
        return (
            from_units(d_queries.mul_(plan.scale), plan).to(q.dtype),
            from_blocks(d_keys.div_(LOG2_E).flatten(1), k, key_valid),  # the queries above hold scale * LOG2_E
            from_blocks(d_values.flatten(1), v, key_valid),
            None if d_bias is None else d_bias.view_as(block_bias).to(block_bias.dtype),
            None,
            None,
            None,
            None,
        )


def _weighted_sums(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, *, follow: bool
) -> Tensor:
    """`(units, rows, value_dim + 1)`: values times exp2(logit - reference), and in the last column those weights' sum.

    With `follow` a row's reference (in `queries`) is raised where a tile holds a higher logit.
    """
    sums = queries.new_zeros(len(queries), plan.rows, values.shape[-1])
    for tile in _tiles(plan):
        if follow:
            weights = _raise_references(queries, keys, bias, sums, tile, plan)
        else:
            weights = _logits(queries, keys, bias, tile)
        _hide(weights, tile, plan)
        part = sums.index_select(0, tile.units)
        part.flatten(0, 1).addmm_(weights.exp2_(), values[tile.block])
        sums.index_copy_(0, tile.units, part)
    return sums


def _table(x: Tensor, key_valid: Tensor | None, plan: Plan) -> Tensor:
    """`(block table, block_size, d + 1)`, wide enough to compute with: the rows of every block, and a 1 each."""
    blocks = to_blocks(x, key_valid, plan).unflatten(1, (plan.layout.block_size, x.shape[-1]))
    return torch.nn.functional.pad(blocks.to(torch.promote_types(x.dtype, torch.float32)), (0, 1), value=1.0)


def _references(queries: Tensor, keys: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """`(units, rows, 1)`: each row's logit with the first key of its list; 0 where it sees nothing of that block.

    A logit of the row itself: however large or small all of them are, its weights neither vanish nor overflow.
    """
    unit = torch.arange(len(queries), device=queries.device)
    slot = torch.zeros_like(unit)
    first = keys[plan.blocks[:, 0], 0, :-1]
    reference = (queries * first.unsqueeze(1)).sum(-1, keepdim=True)
    if bias is not None:
        reference += bias.view(len(queries), -1)[:, :1, None]
    hidden = plan.hidden(unit, slot)
    blind = hidden[..., 0].expand(reference.shape[:-1])
    if bool(blind.any()):  # padding in front, or a list of blocks to come: the highest logit of that block
        unit, row = blind.nonzero(as_tuple=True)
        logits = (keys[plan.blocks[unit, 0], :, :-1] @ queries[unit, row].unsqueeze(-1)).squeeze(-1)
        logits = logits.masked_fill(hidden.expand(-1, plan.rows, -1)[unit, row], -torch.inf).amax(-1)
        if bias is not None:
            logits += bias.view(len(queries), -1)[unit, 0]
        reference[unit, row, 0] = logits.masked_fill(logits == -torch.inf, 0.0)
    return reference


def _tiles(plan: Plan) -> Iterator[_Tile]:
    entries = plan.slots.flatten().nonzero().squeeze(-1)
    blocks = plan.blocks.flatten()[entries]
    masked = plan.masked.flatten()[entries]
    counts = torch.bincount(blocks, minlength=1)
    masked_counts = torch.bincount(blocks[masked], minlength=len(counts)).tolist()
    # A counting sort by block; within one, the masked entries first.
    order = (2 * blocks + ~masked).to(torch.int32).sort(stable=True).indices
    entries, masked = entries[order], masked[order]
    units = entries // plan.slots.shape[1]
    # The last key of its block that each row of a masked entry may see.
    last = plan.last_keys[units[masked] % plan.layout.num_groups] - plan.starts.flatten()[entries[masked], None]
    step, start, place = max(1, TILE_ROWS // plan.rows), 0, 0
    for block, count in enumerate(counts.tolist()):
        left = masked_counts[block]
        for begin in range(start, start + count, step):
            stop = min(begin + step, start + count)
            here, hidden = min(left, stop - begin), None
            if here and plan.causal:
                hidden = plan.keys > last[place : place + here, :, None]
            if here and plan.unseen is not None:
                unseen = plan.unseen[block].expand(here, 1, -1)
                hidden = unseen if hidden is None else hidden | unseen
            yield _Tile(block, entries[begin:stop], units[begin:stop], hidden)
            left, place = left - here, place + here
        start += count


def _logits(queries: Tensor, keys: Tensor, bias: Tensor | None, tile: _Tile) -> Tensor:
    """`(units * rows, block_size)` in powers of two, less the rows' references."""
    rows = queries.index_select(0, tile.units)
    if bias is not None:
        rows[..., -1] += bias[tile.entries, None]
    return rows.flatten(0, 1) @ keys[tile.block].T


def _raise_references(
    queries: Tensor, keys: Tensor, bias: Tensor | None, sums: Tensor, tile: _Tile, plan: Plan
) -> Tensor:
    """Raise rows' references to their highest logit so far and adapt their sums; the logits less the new ones."""
    old = -queries[tile.units][..., -1:]
    logits = queries[tile.units][..., :-1] @ keys[tile.block][:, :-1].T
    if bias is not None:
        logits += bias[tile.entries, None, None]
    _hide(logits.flatten(0, 1), tile, plan)
    new = torch.maximum(old, logits.amax(-1, keepdim=True))
    nothing_yet = new == -torch.inf
    sums[tile.units] *= (old - new).exp2().masked_fill(nothing_yet, 0.0)
    queries[tile.units, :, -1:] = -new
    return (logits - new.masked_fill(nothing_yet, 0.0)).flatten(0, 1)


def _hide(logits: Tensor, tile: _Tile, plan: Plan) -> None:
    """Set unseen pairs to -inf."""
    if tile.hidden is not None:
        logits.view(len(tile.units), plan.rows, -1)[: len(tile.hidden)].masked_fill_(tile.hidden, -torch.inf)
