"""Block-sparse attention that leaves out no product: all pairs of a chunk of queries, of which the listed are picked.

Where sequences are short, blocks small or most is listed, leaving products out (`query_major.py`,
`key_major.py`) costs more than doing them. Softmax sees the listed pairs only, and a chunk of
queries the keys up to its last one, so it costs about what dense attention does, whatever the lists are.

Plain torch on any device, written for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels.backends.cpu.fused import fused, serves
from astbench_kernels.backends.cpu.units import LOG2_E, Scratch, Units, from_units, to_units
from astbench_kernels.dispatch import rules
from astbench_kernels.layout import BlockLayout


@dataclass
class _Chunk:
    """Consecutive groups of some lists, or all groups of several, and what they pick.

    Attributes:
        lists: Of the call's lists, batch x list heads.
        groups: Of those.
        rows: The query rows of those groups.
        table: The rows of the key table that the lists read: a slice where they are consecutive.
        keys: Keys that some row may see, from the first on.
        width: The longest list's blocks.
        index: int64 `(lists, groups, 1 or rows, width * block_size)`: the listed keys; `keys` where a pair may not be
            seen or there is none.
        empty: Bool `(lists, groups, 1, width, 1)`: slots without a block.
    """

    lists: slice
    groups: slice
    rows: slice
    table: slice | Tensor
    keys: int
    width: int
    index: Tensor
    empty: Tensor

    def pick(self, products: Tensor) -> Tensor:
        """`(lists, groups, rows, width * block_size)` of `(lists, groups * rows, keys + 1)`."""
        products = products.unflatten(1, (self.index.shape[1], -1))
        return products.gather(-1, self.index.expand(-1, -1, products.shape[2], -1))

    def read(self, table: Tensor) -> Tensor:
        """`(lists, keys + 1, d)` of `(tables, key_length + 1, d)`."""
        return table[self.table, : self.keys + 1]

    def add(self, part: Tensor, table: Tensor) -> None:
        """Add `(lists, keys + 1, d)` to `(tables, key_length + 1, d)`, in place, without the row behind the last."""
        part = part[:, : self.keys]
        if isinstance(self.table, slice):
            table[self.table, : self.keys].add_(part)
        else:
            table[:, : self.keys].index_add_(0, self.table, part)

    def place(self, picked: Tensor, products: Tensor) -> Tensor:
        """The inverse, in place; what was not picked stays, and behind the last key there is anything."""
        index = self.index.expand(-1, -1, picked.shape[2], -1)
        products.unflatten(1, (self.index.shape[1], -1)).scatter_(-1, index, picked)
        return products


@dataclass
class _Listing(Units):
    """A call's lists; `n` is batch x list heads."""

    blocks: Tensor  # int32 (n, groups, width): listed blocks; anything in empty slots
    counts: Tensor  # int32 (n, groups)
    since: Tensor | None  # int (n, groups, width): the first place in a group that sees a block; None for 0
    limit: Tensor  # int64 (groups, 1 or rows): the last key that a row may see
    stops: list[int]  # of each group: keys that some row of it may see
    bias: Tensor | None  # (n, groups, width): anything in empty slots; None for none
    unseen: Tensor | None  # bool (batch, key_length + 1): what padding hides; None without
    table: Tensor  # int64 (n,): the batch row and key/value head of each list
    kv_heads: int

    def chunks(self) -> Iterator[_Chunk]:
        """All of the call but what lists or sees nothing."""
        for cut in _cut(self.counts, self.layout.block_size, self.rows, self.stops):
            yield self._chunk(*cut)

    def _chunk(self, lists: slice, groups: slice, keys: int, width: int) -> _Chunk:
        size, device = self.layout.block_size, self.blocks.device
        empty = torch.arange(width, device=device) >= self.counts[lists, groups, None]
        starts = (self.blocks[lists, groups, :width].long() * size).masked_fill_(empty, self.layout.key_length)
        index = (starts.unsqueeze(-1) + torch.arange(size, device=device)).flatten(2).unsqueeze(2)
        index = torch.where(index > self.limit[groups, :, None], keys, index)
        if self.since is not None:
            early = self.places(device)[:, None] < self.since[lists, groups, None, :width]
            index = torch.where(early.repeat_interleave(size, -1), keys, index)
        table = self.table[lists]
        first, last = int(table[0]), int(table[-1])
        consecutive = last - first + 1 == len(table)  # each is its predecessor's, or the next one
        if self.unseen is not None:
            unseen = self.unseen[:, : keys + 1].clone()
            unseen[:, keys] = False
            batch_row = (table // self.kv_heads).view(-1, 1, 1, 1)
            index = index.masked_fill(unseen[batch_row, index], keys)
        return _Chunk(
            lists=lists,
            groups=groups,
            rows=slice(groups.start * self.rows, groups.stop * self.rows),
            table=slice(first, last + 1) if consecutive else table,
            keys=keys,
            width=width,
            index=index,
            empty=empty[:, :, None, :, None],
        )

    def mask(self, tables: slice, groups: slice, keys: int, causal: bool, scratch: Scratch) -> Tensor:
        """-inf where a pair may not be seen, else 0: `(tables, 1, rows of a table's lists in those groups, keys)`.

        Args:
            tables: Batch row x key/value heads.
            groups: Some that follow each other.
            keys: The first so many.
            causal: Whether under a causal mask.
            scratch: Where it goes.
        """
        layout, each = self.layout, len(self.table) // (self.batch * self.kv_heads)
        size, group = layout.block_size, layout.query_group
        lists, blocks = slice(tables.start * each, tables.stop * each), -(-keys // size)
        listed, number = self.blocks[lists, groups].long(), groups.stop - groups.start
        slot = torch.arange(listed.shape[-1], device=listed.device) < self.counts[lists, groups, None]
        index = torch.where(slot & (listed < blocks), listed, blocks)
        first = torch.full((*listed.shape[:2], blocks + 1), group, dtype=torch.int32, device=listed.device)
        since = 0 if self.since is None else self.since[lists, groups].to(torch.int32)
        first = first.scatter_(-1, index, since)[:, :, None, :-1]
        early = self.places(listed.device).to(torch.int32)[:, None] < first
        shape = len(listed), number, self.rows, blocks
        coarse = scratch.take("coarse", scratch.dtype, *shape, 1).zero_().masked_fill_(early.unsqueeze(-1), -torch.inf)
        mask = (
            scratch.take("mask", scratch.dtype, *shape, size).copy_(coarse.expand(*shape, size)).flatten(3)[..., :keys]
        )
        limit = self.limit[groups]
        if causal and int(limit.min()) + 1 < keys:
            late = slice(int(limit.min()) + 1, keys)
            mask[..., late].masked_fill_(
                torch.arange(late.start, keys, device=limit.device) > limit.unsqueeze(-1), -torch.inf
            )
        if self.unseen is not None:
            row = self.table[lists] // self.kv_heads
            mask.masked_fill_(self.unseen[row, None, None, :keys], -torch.inf)
        return mask.reshape(tables.stop - tables.start, 1, -1, keys)

    def logits(self, queries: Tensor, keys: Tensor, chunk: _Chunk, scratch: Scratch) -> Tensor:
        """The picked ones of a chunk, bias added, -inf where a pair may not be seen."""
        products = scratch.bmm("products", queries, keys.transpose(1, 2))
        products[..., chunk.keys] = -torch.inf
        logits = chunk.pick(products)
        if self.bias is not None:
            bias = self.bias[chunk.lists, chunk.groups, None, : chunk.width, None].masked_fill(chunk.empty, 0.0)
            logits.unflatten(-1, (chunk.width, -1)).add_(bias.to(logits.dtype) * LOG2_E)
            logits.masked_fill_(chunk.index == chunk.keys, -torch.inf)  # a bias may be NaN or inf where nobody sees it
        return logits


class MaskedAttention(torch.autograd.Function):
    """See :func:`astbench_kernels.backends.cpu.query_major.gather_attention`."""

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
        listing = _listing(q, k, block_bias, layout, causal, key_valid)
        if serves(q, k, v, block_bias):
            out, lse = _forward_fused(q, k, v, listing, key_valid, scale, causal)
        else:
            out, lse = _forward_in_steps(q, k, v, listing, key_valid, scale)
        ctx.save_for_backward(q, k, v, block_bias, key_valid, out, lse)
        ctx.call = layout, scale, causal
        out, lse = (from_units(x.view(-1, listing.rows, x.shape[-1]), listing) for x in (out, lse))
        return out.to(q.dtype), lse.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the block bias."""
        q, k, v, block_bias, key_valid, out, lse = ctx.saved_tensors
        layout, scale, causal = ctx.call
        listing = _listing(q, k, block_bias, layout, causal, key_valid)
        queries, keys, values = _inputs(q, k, v, key_valid, listing, scale)
        d_out = to_units(grads[0], listing).to(queries.dtype).reshape_as(out)
        # d logits = P * (dP - delta + d lse), delta = rowsum(dO * O) = rowsum(dP * P)
        rounded = out.dtype != queries.dtype
        shift = -to_units(grads[1].unsqueeze(-1), listing).reshape_as(lse)
        if not rounded:
            shift += (d_out * out).sum(-1, keepdim=True)
        known_lse = (lse * LOG2_E).masked_fill_(lse == -torch.inf, 0.0)  # rows that see nothing: exp(-inf - 0) = 0
        d_queries, d_keys, d_values = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        d_bias = None if listing.bias is None else torch.zeros_like(listing.bias, dtype=queries.dtype)
        scratch = Scratch(queries)
        for chunk in listing.chunks():
            where = chunk.lists, chunk.rows
            key, grad = chunk.read(keys), d_out[where]
            weights = listing.logits(queries[where], key, chunk, scratch)
            each = weights.shape[1:3]
            weights.sub_(known_lse[where].unflatten(1, each)).exp2_()
            spread = scratch.take("spread", grad.dtype, *grad.shape[:2], chunk.keys + 1).zero_()
            chunk.place(weights, spread)
            chunk.add(scratch.bmm("part", spread.transpose(1, 2), grad), d_values)
            d_logits = chunk.pick(scratch.bmm("products", grad, chunk.read(values).transpose(1, 2)))
            if rounded:  # gradients would be several times as far off
                delta = d_logits.mul_(weights).sum(-1, keepdim=True).add_(shift[where].unflatten(1, each))
                d_logits.addcmul_(weights, delta, value=-1)
            else:
                d_logits.sub_(shift[where].unflatten(1, each)).mul_(weights)
            if d_bias is not None:
                tiles = d_logits.unflatten(-1, (chunk.width, -1))
                d_bias[chunk.lists, chunk.groups, : chunk.width] = tiles.sum((2, 4))
            chunk.place(d_logits, spread)
            torch.bmm(spread, key, out=d_queries[where])
            chunk.add(scratch.bmm("part", spread.transpose(1, 2), queries[where]), d_keys)
        return (
            from_units(d_queries.mul_(scale).view(-1, listing.rows, q.shape[-1]), listing).to(q.dtype),
            _like(d_keys.div_(LOG2_E), k, key_valid),  # the queries above hold scale * LOG2_E
            _like(d_values, v, key_valid),
            None if block_bias is None or d_bias is None else d_bias.view_as(block_bias).to(block_bias.dtype),
            None,
            None,
            None,
            None,
        )


def _forward_in_steps(
    q: Tensor, k: Tensor, v: Tensor, listing: _Listing, key_valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(lists, groups * rows, d)` and log-sum-exp, in float32 or more."""
    queries, keys, values = _inputs(q, k, v, key_valid, listing, scale)
    out = queries.new_zeros(*queries.shape[:2], v.shape[-1])
    lse = torch.full((*queries.shape[:2], 1), -torch.inf, dtype=queries.dtype, device=q.device)
    scratch = Scratch(queries)
    for chunk in listing.chunks():
        where = chunk.lists, chunk.rows
        weights = listing.logits(queries[where], chunk.read(keys), chunk, scratch)
        # Rows that see nothing: weights 0, log-sum-exp log 0 = -inf; no NaN on the way.
        highest = weights.amax(-1, keepdim=True)
        highest.masked_fill_(highest == -torch.inf, 0.0)
        total = weights.sub_(highest).exp2_().sum(-1, keepdim=True)
        lse[where] = (highest + total.log2()).flatten(1, 2)
        weights.div_(total.clamp_(min=torch.finfo(total.dtype).tiny))
        spread = scratch.take("spread", out.dtype, *out[where].shape[:2], chunk.keys + 1).zero_()
        torch.bmm(chunk.place(weights, spread), chunk.read(values), out=out[where])
    return out, lse.div_(LOG2_E)


def _forward_fused(
    q: Tensor, k: Tensor, v: Tensor, listing: _Listing, key_valid: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The same by torch's fused kernel, in the dtype of `q`, without a bias: a slab of queries at a time.

    Lists that read one key/value head are rows of one call, each with its own mask.
    """
    if key_valid is not None:  # padding may hold NaN
        k, v = (x.masked_fill(~key_valid[:, None, :, None], 0.0) for x in (k, v))
    keys, values = k.flatten(0, 1).unsqueeze(1), v.flatten(0, 1).unsqueeze(1)
    tables, groups, rows = len(keys), listing.layout.num_groups, listing.rows
    queries = to_units(q, listing).view(tables, -1, groups, rows, q.shape[-1])
    out = queries.new_zeros(queries.shape)
    lse = queries.new_full((*queries.shape[:-1], 1), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    scratch = Scratch(q)
    step = max(1, rules.SLAB_ROWS // rows)
    for start in reversed(range(0, groups, step)):  # the one with the most keys first: the others use its memory again
        some = slice(start, min(start + step, groups))
        stop = listing.stops[some.stop - 1]
        pairs = queries.shape[1] * (some.stop - start) * rows * max(1, stop)
        together = max(1, rules.SLAB_PAIRS // pairs)
        for first in range(0, tables, together) if stop else ():
            part = slice(first, min(first + together, tables))
            mask = listing.mask(part, some, stop, causal, scratch)
            query, into = queries[part, :, some], out[part, :, some]
            found, sums = fused(
                query.reshape(len(query), 1, -1, q.shape[-1]), keys[part, :, :stop], values[part, :, :stop], mask, scale
            )
            into.copy_(found.view(into.shape))
            lse[part, :, some] = sums.view(*into.shape[:-1], 1)
    return out.view(-1, groups * rows, q.shape[-1]), lse.view(-1, groups * rows, 1)


def _cut(counts: Tensor, size: int, rows: int, stops: list[int]) -> Iterator[tuple[slice, slice, int, int]]:
    """Chunks of about CHUNK_PAIRS pairs, computed or picked: lists, groups, the keys those see, blocks listed.

    What lists nothing or sees nothing is in none.

    Args:
        counts: `(lists, groups)`: blocks listed.
        size: Keys of a block.
        rows: Query rows of a group.
        stops: Keys that some row of a group may see; later groups never see less.
    """
    pairs, number, groups = rules.CHUNK_PAIRS, len(counts), len(stops)
    longest, widths = counts.amax(0).tolist(), counts.tolist()
    together = max(1, pairs // max(1, groups * rows * max(stops[-1], size * max(longest))))
    for first in range(0, number, together):
        lists, start = slice(first, min(first + together, number)), 0
        while start < groups:
            stop, most = start + 1, longest[start]
            while stop < groups:
                most = max(most, longest[stop])
                if (stop + 1 - start) * rows * max(stops[stop], size * most) > pairs:
                    break
                stop += 1
            width = max(max(row[start:stop]) for row in widths[lists])
            if width and stops[stop - 1]:
                yield lists, slice(start, stop), stops[stop - 1], width
            start = stop


def _limit(units: Units, causal: bool, device: torch.device) -> Tensor:
    """int64 `(groups, 1 or rows)`: the last key that a row may see."""
    last = units.layout.key_length - 1
    if not causal:
        return torch.full((units.layout.num_groups, 1), last, device=device)
    return units.last_keys(device).repeat(1, units.heads_per_list).clamp(max=last)


def _like(x: Tensor, like: Tensor, key_valid: Tensor | None) -> Tensor:
    """Gradients of the key table as those of `(batch, kv_heads, key_length, d)`; padding gets none."""
    x = x[:, :-1].reshape(like.shape).to(like.dtype)
    return x if key_valid is None else x.masked_fill(~key_valid[:, None, :, None], 0.0)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, listing: _Listing, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(n, groups * rows, d)`, times the scale and in powers of two, keys and values `(tables, keys + 1, d)`.

    One row of zeros more than there are keys, for the column of what may not be seen.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    queries = to_units(q, listing).to(compute) * (scale * LOG2_E)
    if key_valid is not None:
        # Padding may hold NaN; a zero weight would keep it.
        k, v = (x.masked_fill(~key_valid[:, None, :, None], 0.0) for x in (k, v))
    keys, values = (pad(x.to(compute), (0, 0, 0, 1)).flatten(0, 1) for x in (k, v))
    return queries.reshape(len(listing.table), -1, q.shape[-1]), keys, values


def _listing(
    q: Tensor, k: Tensor, block_bias: Tensor | None, layout: BlockLayout, causal: bool, key_valid: Tensor | None
) -> _Listing:
    batch, lists = layout.indices.shape[:2]
    kv_heads, device = k.shape[1], q.device
    units = Units(layout, batch, q.shape[1] // lists)
    limit = _limit(units, causal, device)
    row = torch.arange(batch, device=device)[:, None] * kv_heads
    return _Listing(
        layout=layout,
        batch=batch,
        heads_per_list=units.heads_per_list,
        blocks=layout.indices.flatten(0, 1),
        counts=layout.counts.flatten(0, 1),
        since=None if layout.since is None else layout.since.flatten(0, 1),
        limit=limit,
        stops=(limit.amax(-1) + 1).tolist(),
        bias=None if block_bias is None else block_bias.detach().flatten(0, 1),
        unseen=None if key_valid is None else pad(~key_valid, (0, 1)),
        table=(row + torch.arange(lists, device=device) * kv_heads // lists).flatten(),
        kv_heads=kv_heads,
    )
