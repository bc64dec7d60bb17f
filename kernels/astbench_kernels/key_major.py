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
from torch.nn.functional import pad

from astbench_kernels.layout import BlockLayout
from astbench_kernels.units import LOG2_E, Plan, from_blocks, from_units, make_plan, to_blocks, to_units

TILE_ROWS = 2048
"""Query rows of a tile: its parts stay within a few MB."""

FILLING = 1.25
"""How much longer a tile of several blocks may be than what they hold."""


@dataclass
class _Tile:
    """Units that chose each of a few consecutive key blocks; of each block those first that may not see all of it.

    Shorter blocks are filled up with the unit and the entry behind the last one, which weigh nothing.
    """

    blocks: slice
    units: Tensor  # int64 (blocks, n)
    hidden: Tensor | None  # bool (blocks, the first units, rows or 1, block_size): pairs that may not be seen
    places: Tensor  # int64 (blocks, n): of the units among the sorted entries
    all_entries: Tensor  # int64: flat places in the (units, width) lists, sorted by block

    @property
    def entries(self) -> Tensor:
        """int64 `(blocks, n)`: flat places in the `(units, width)` lists."""
        return self.all_entries[self.places]


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
        bias = None if block_bias is None else pad(block_bias.detach().flatten().to(compute) * LOG2_E, (0, 1))
        queries = to_units(q, plan).to(compute) * (scale * LOG2_E)
        # A row's last column is minus its reference, and every key's is 1: the product is the logit less the reference.
        queries = _with_filler(torch.cat([queries, -_references(queries, keys, bias, plan)], -1))
        sums = _weighted_sums(queries, keys, values, bias, plan, follow=False)
        if not bool(sums.isfinite().all()):
            # A logit lies 2^7 powers of two above its row's reference (or the inputs are not finite): once more, with
            # care. Looking at every tile beforehand cost more than a tenth of the work.
            sums = _weighted_sums(queries, keys, values, bias, plan, follow=True)
        total = sums[:-1, :, -1:]
        out = sums[:-1, :, :-1] / total.clamp(min=torch.finfo(compute).tiny)
        # Rows that see nothing: output 0, log-sum-exp log 0 = -inf.
        lse = (total.log2() - queries[:-1, :, -1:]).masked_fill_(total == 0, -torch.inf)
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
        bias = None if block_bias is None else pad(block_bias.flatten().to(compute) * LOG2_E, (0, 1))
        d_out, d_lse = to_units(grads[0], plan).to(compute), to_units(grads[1].unsqueeze(-1), plan)
        known_lse = lse.masked_fill(lse == -torch.inf, 0.0)  # rows that see nothing: exp(-inf - 0) = 0
        queries = _with_filler(torch.cat([to_units(q, plan).to(compute) * (plan.scale * LOG2_E), -known_lse], -1))
        # d logits = P * (dO V^T - delta + d lse), delta = rowsum(dO * O): the last column again.
        d_out = torch.cat([d_out, d_lse - (d_out * out).sum(-1, keepdim=True)], -1)
        d_out = pad(d_out, (0, 0, 0, 0, 0, 1))
        d_queries = torch.zeros_like(queries[..., :dim])
        d_keys, d_values = torch.zeros_like(keys[..., :dim]), torch.zeros_like(values[..., :-1])
        d_bias = None if bias is None else torch.zeros_like(bias)
        for tile in _tiles(plan):
            rows, logits = _logits(queries, keys, bias, tile)
            weights = _hide(logits, tile, plan).exp2_()
            given = d_out.index_select(0, tile.units.flatten()).view(len(tile.units), -1, d_out.shape[-1])
            d_values[tile.blocks].baddbmm_(weights.transpose(1, 2), given[..., :-1])
            d_logits = torch.bmm(given, values[tile.blocks].transpose(1, 2)).mul_(weights)
            if d_bias is not None:
                d_bias[tile.entries] = d_logits.view(*tile.units.shape, -1).sum(-1)
            d_keys[tile.blocks].baddbmm_(d_logits.transpose(1, 2), rows[..., :dim])
            d_rows = torch.bmm(d_logits, keys[tile.blocks][..., :dim])
            d_queries.index_add_(0, tile.units.flatten(), d_rows.view(-1, plan.rows, dim))
        d_queries, d_bias = d_queries[:-1], None if d_bias is None else d_bias[:-1]
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
    # A row that chose several blocks of a tile can only have one reference raised at a time.
    for tile in _tiles(plan, blocks_at_a_time=1 if follow else None):
        if follow:
            logits = _raise_references(queries, keys, bias, sums, tile, plan)
        else:
            _, logits = _logits(queries, keys, bias, tile)
        part = torch.bmm(_hide(logits, tile, plan).exp2_(), values[tile.blocks])
        sums.index_add_(0, tile.units.flatten(), part.view(-1, plan.rows, values.shape[-1]))
    return sums


def _with_filler(queries: Tensor) -> Tensor:
    """One more unit, for a tile's empty places: its logits are -inf with every key, so that it weighs nothing."""
    queries = pad(queries, (0, 0, 0, 0, 0, 1))
    queries[-1, :, -1] = -torch.inf
    return queries


def _table(x: Tensor, key_valid: Tensor | None, plan: Plan) -> Tensor:
    """`(block table, block_size, d + 1)`, wide enough to compute with: the rows of every block, and a 1 each."""
    blocks = to_blocks(x, key_valid, plan).unflatten(1, (plan.layout.block_size, x.shape[-1]))
    return pad(blocks.to(torch.promote_types(x.dtype, torch.float32)), (0, 1), value=1.0)


def _references(queries: Tensor, keys: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """`(units, rows, 1)`: each row's logit with the first key of its list, or one that it sees; 0 for blind rows.

    A logit of the row itself: however large or small all of them are, its weights neither vanish nor overflow.
    """
    unit = torch.arange(len(queries), device=queries.device)
    first = keys[plan.blocks[:, 0].long(), 0, :-1]
    reference = (queries * first.unsqueeze(1)).sum(-1)
    if bias is not None:
        reference += bias[:-1].view(len(queries), -1)[:, :1]
    hidden = plan.hidden(unit, torch.zeros_like(unit))[..., 0] | (reference == -torch.inf)  # by a bias
    reference.masked_fill_(hidden, 0.0)
    # Behind padding, or with only blocks of which it sees the end: the highest logit of the first one it sees any of.
    unit, row = (hidden & plan.slots.any(1, keepdim=True)).nonzero(as_tuple=True)
    for slot in range(plan.slots.shape[1]):
        if not len(unit):
            break
        logits = (keys[plan.blocks[unit, slot].long(), :, :-1] @ queries[unit, row].unsqueeze(-1)).squeeze(-1)
        unseen = plan.hidden(unit, torch.full_like(unit, slot)).expand(-1, plan.rows, -1)
        highest = logits.masked_fill(unseen[torch.arange(len(unit)), row], -torch.inf).amax(-1)
        if bias is not None:
            highest += bias[:-1].view(len(queries), -1)[unit, slot]
        found = highest > -torch.inf
        reference[unit[found], row[found]] = highest[found]
        unit, row = unit[~found], row[~found]
    return reference.unsqueeze(-1)


def _tiles(plan: Plan, blocks_at_a_time: int | None = None) -> Iterator[_Tile]:
    width = plan.slots.shape[1]
    entries = plan.slots.flatten().nonzero().squeeze(-1)
    blocks = plan.blocks.flatten()[entries]
    masked = plan.masked.flatten()[entries]
    # A counting sort by block; within one, the masked entries first.
    order = (2 * blocks + ~masked).sort(stable=True).indices
    counts = torch.bincount(blocks, minlength=1)
    masked_counts = torch.bincount(blocks[masked], minlength=len(counts))
    entries, masked = entries[order], masked[order]
    del blocks, order  # as long as a list of all pairs, each
    # Of each masked entry's rows the last key in its block that causality shows them; behind the end, everything.
    rows = plan.last_keys[entries[masked] // width % plan.layout.num_groups]
    last = pad(rows - plan.starts.flatten()[entries[masked], None], (0, 0, 0, 1), value=plan.layout.block_size)
    entries = pad(entries, (0, 1), value=plan.slots.numel())  # the filler
    units = entries // width
    counting = torch.arange(max(1, TILE_ROWS // plan.rows), device=units.device)
    starts, masked_starts = (pad(x.cumsum(0), (1, 0)) for x in (counts, masked_counts))
    numbers, masked_numbers = counts.tolist(), masked_counts.tolist()
    for chosen in _runs(numbers, len(counting), blocks_at_a_time):
        most, most_masked = max(numbers[chosen]), max(masked_numbers[chosen])
        for begin in range(0, most, len(counting)):
            places = _places(starts, chosen, begin, counting[: most - begin], len(units) - 1)
            hidden = None
            if most_masked > begin:
                some = _places(masked_starts, chosen, begin, counting[: most_masked - begin], len(last) - 1)
                hidden = _hidden(plan, chosen, last[some] if plan.causal else None, some.shape[1])
            yield _Tile(chosen, units[places], hidden, places, entries)


def _places(starts: Tensor, chosen: slice, begin: int, counting: Tensor, filler: int) -> Tensor:
    """int64 `(blocks, n)`: places `begin` and following of each block's entries in a list sorted by block."""
    places = starts[chosen, None] + begin + counting
    return places.where(places < starts[chosen.start + 1 : chosen.stop + 1, None], filler)


def _runs(counts: list[int], step: int, blocks_at_a_time: int | None) -> Iterator[slice]:
    """Consecutive blocks whose units fill a tile together, without too many empty places."""
    start = 0
    while start < len(counts):
        stop, most, taken = start + 1, counts[start], counts[start]
        while stop < len(counts) and stop - start != blocks_at_a_time:
            most, taken, blocks = max(most, counts[stop]), taken + counts[stop], stop + 1 - start
            if blocks * most > step or blocks * most > FILLING * taken:
                break
            stop += 1
        if most:
            yield slice(start, stop)
        start = stop


def _hidden(plan: Plan, blocks: slice, last: Tensor | None, units: int) -> Tensor:
    """Bool `(blocks, units, rows or 1, block_size)`: what causality and padding hide of a tile's first units."""
    hidden = None if last is None else plan.keys > last.unsqueeze(-1)
    if plan.unseen is None:
        assert hidden is not None, "only causality and padding hide pairs of listed blocks"
        return hidden
    unseen = plan.unseen[blocks, None, None, :].expand(-1, units, -1, -1)
    return unseen if hidden is None else hidden | unseen


def _logits(queries: Tensor, keys: Tensor, bias: Tensor | None, tile: _Tile) -> tuple[Tensor, Tensor]:
    """The tile's rows `(blocks, n * rows, d + 1)`, and their logits in powers of two less the rows' references."""
    rows = queries.index_select(0, tile.units.flatten())
    if bias is not None:
        rows[..., -1] += bias[tile.entries.flatten(), None]
    rows = rows.view(len(tile.units), -1, queries.shape[-1])
    return rows, torch.bmm(rows, keys[tile.blocks].transpose(1, 2))


def _raise_references(
    queries: Tensor, keys: Tensor, bias: Tensor | None, sums: Tensor, tile: _Tile, plan: Plan
) -> Tensor:
    """Raise rows' references to their highest logit so far and adapt their sums; the logits less the new ones."""
    units = tile.units[0]
    old = -queries[units][..., -1:]
    logits = queries[units][..., :-1] @ keys[tile.blocks.start][:, :-1].T
    if bias is not None:
        logits += bias[tile.entries[0], None, None]
    _hide(logits.view(1, -1, logits.shape[-1]), tile, plan)
    new = torch.maximum(old, logits.amax(-1, keepdim=True))
    sums[units] *= (old - new).exp2()
    queries[units, :, -1:] = -new
    return (logits - new).view(1, -1, logits.shape[-1])


def _hide(logits: Tensor, tile: _Tile, plan: Plan) -> Tensor:
    """Set unseen pairs of `(blocks, n * rows, block_size)` to -inf, in place."""
    if tile.hidden is not None:
        places = logits.view(*tile.units.shape, plan.rows, -1)
        places[:, : tile.hidden.shape[1]].masked_fill_(tile.hidden, -torch.inf)
    return logits
