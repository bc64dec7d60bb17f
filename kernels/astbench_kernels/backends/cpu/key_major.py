"""Block-sparse attention key block by key block: gather the query rows that chose it, two matmuls, merge.

The other way round than `query_major.py`, for lists that few rows share (a causal model chooses for
every token by itself). There, gathering each list's own keys would cost more than the work on them; here a tile is as
tall as the number of rows that chose the block, whoever shares their lists.

A call is done in chunks, some thousand query rows with their lists: what belongs to one stays in cache, and nothing is
held for every entry of every list.

Plain torch on any device, written for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from astbench_kernels.backends.cpu.units import LOG2_E, Units, from_blocks, from_units, to_blocks, to_units, unseen_keys
from astbench_kernels.layout import BlockLayout

CHUNK_ROWS = 4096
"""Query rows of a chunk, per key/value head: the more, the fewer small calls; the fewer, the less memory."""

TILE_ROWS = 3072
"""Query rows of a tile: its logits stay in cache."""

PARTIAL_ROWS = 32768
"""Rows of tiles' results that are held before they are added up."""

FILLING, FILLING_ROWS = 0.15, 256
"""How much longer a tile of several blocks may be than what they hold, as a share or in rows: one more tile costs more
than computing that many rows."""


@dataclass
class _Chunk(Units):
    """Some batch rows, or some groups of one list, with the blocks that they may choose.

    `queries` index `(batch, heads, query_length)`, `lists` index `(batch, list_heads, groups, width)`, `tables` index
    `(batch, kv_heads)`.
    """

    queries: tuple[slice, ...]
    lists: tuple[slice, ...]
    tables: tuple[slice, ...]
    blocks: Tensor  # int32 (units, width): rows of the block table; anything in empty slots
    slots: Tensor  # bool (units, width): which of them are listed, and hold a key that somebody sees
    whole: Tensor  # bool (units, width): which of them hold no pair that may not be seen
    last: Tensor | None  # int64 (groups, rows): the last key that a causal mask shows to each query row of a unit
    unseen: Tensor | None  # bool (block table, block_size): keys that nobody may see; None where there are none

    @property
    def num_blocks(self) -> int:
        """Of the block table."""
        return self.batch * (self.tables[1].stop - self.tables[1].start) * self.layout.num_blocks

    def hidden(self, unit: Tensor, block: Tensor, keys: Tensor) -> Tensor:
        """Bool `(n, rows or 1, keys)`: which keys of a block of the table its unit's rows may not see."""
        hidden = torch.zeros(len(unit), 1, len(keys), dtype=torch.bool, device=unit.device)
        if self.unseen is not None:
            hidden = self.unseen.index_select(0, block).index_select(1, keys).unsqueeze(1)
        if self.last is not None:
            start = block % self.layout.num_blocks * self.layout.block_size
            last = self.last[unit % self.layout.num_groups] - start.unsqueeze(-1)
            hidden = hidden | (keys > last.unsqueeze(-1))
        return hidden


@dataclass
class _Tile:
    """Units that chose each of a few consecutive key blocks; of each block those first that may not see all of it.

    Shorter blocks are filled up with the unit and the entry behind the last one, which weigh nothing.
    """

    blocks: slice
    places: slice  # among all tiles' entries
    entries: Tensor  # int64 (blocks, n): flat places in the (units, width) lists
    units: Tensor  # int64 (blocks, n)
    hidden: Tensor | None  # bool (blocks, the first units, rows or 1, block_size): pairs that may not be seen


class KeyMajorAttention(torch.autograd.Function):
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
        compute = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=compute)  # the backward pass needs it unrounded
        lse = q.new_empty(q.shape[:-1], dtype=compute)
        memory: list[Tensor] = []
        tables = _Tables(k, v, key_valid)
        for chunk in _chunks(q, k, layout, causal, key_valid):
            keys, values = tables.of(chunk)
            bias = _bias(block_bias, chunk, compute)
            queries = to_units(q[chunk.queries], chunk).to(compute) * (scale * LOG2_E)
            # A row's last column is minus its reference, and every key's is 1: the product is the logit less that.
            queries = _with_filler(torch.cat([queries, -_references(queries, keys, bias, chunk)], -1))
            sums = _weighted_sums(queries, keys, values, bias, chunk, memory)
            if not bool(sums.sum().isfinite()):
                # A logit lies 2^7 powers of two above its row's reference (or the inputs are not finite): once more,
                # with care. Looking at every tile beforehand cost more than a tenth of the work.
                sums = _weighted_sums_with_care(queries, keys, values, bias, chunk)
            total = sums[..., -1:]
            out[chunk.queries] = from_units(sums[..., :-1] / total.clamp(min=torch.finfo(compute).tiny), chunk)
            # Rows that see nothing: output 0, log-sum-exp log 0 = -inf.
            logs = (total.log2() - queries[:-1, :, -1:]).masked_fill_(total == 0, -torch.inf)
            lse[chunk.queries] = from_units(logs / LOG2_E, chunk).squeeze(-1)
        ctx.save_for_backward(q, k, v, block_bias, key_valid, out, lse)
        ctx.call = layout, scale, causal
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the block bias."""
        q, k, v, block_bias, key_valid, out, lse = ctx.saved_tensors
        layout, scale, causal = ctx.call
        compute, dim = lse.dtype, k.shape[-1]
        d_q = torch.empty_like(q)
        # Many rows add to one block: sum in float32 whatever the inputs are.
        blocks = (*k.shape[:2], layout.num_blocks, layout.block_size)
        d_k, d_v = q.new_zeros(*blocks, dim, dtype=compute), q.new_zeros(*blocks, v.shape[-1], dtype=compute)
        d_block_bias = None if block_bias is None else torch.zeros_like(block_bias)
        memory: list[Tensor] = []
        tables = _Tables(k, v, key_valid)
        for chunk in _chunks(q, k, layout, causal, key_valid):
            keys, values = tables.of(chunk)
            d_keys, d_values = (x[chunk.tables].flatten(0, 2) for x in (d_k, d_v))
            bias = _bias(block_bias, chunk, compute)
            d_out, d_lse = (to_units(x[chunk.queries].to(compute), chunk) for x in (grads[0], grads[1].unsqueeze(-1)))
            # Rows that are no queries: exp(logit - inf) = 0, however large their block's bias.
            known_lse = to_units(lse.unsqueeze(-1)[chunk.queries], chunk, value=torch.inf)
            known_lse = known_lse.masked_fill(known_lse == -torch.inf, 0.0)  # blind rows: exp(-inf - 0) = 0
            queries = to_units(q[chunk.queries], chunk).to(compute)
            queries = _with_filler(torch.cat([queries * (scale * LOG2_E), known_lse * -LOG2_E], -1))
            # d logits = P * (dO V^T - delta + d lse), delta = rowsum(dO * O): the last column again.
            delta = (d_out * to_units(out[chunk.queries], chunk)).sum(-1, keepdim=True)
            d_out = pad(torch.cat([d_out, d_lse - delta], -1), (0, 0, 0, 0, 0, 1))
            d_bias = None if bias is None else torch.zeros_like(bias)
            tiles = _Tiles(chunk)
            parts = _PartialSums(queries.new_zeros(len(queries) - 1, chunk.rows, dim), tiles, memory)
            for tile in tiles:
                rows, logits = _logits(queries, keys, bias, tile)
                weights = _hide(logits, tile, chunk).exp2_()
                given = d_out.index_select(0, tile.units.flatten()).view(len(tile.units), -1, d_out.shape[-1])
                d_values[tile.blocks].baddbmm_(weights.transpose(1, 2), given[..., :-1])
                d_logits = torch.bmm(given, values[tile.blocks].transpose(1, 2)).mul_(weights)
                if d_bias is not None:
                    d_bias[tile.entries] = d_logits.view(*tile.units.shape, -1).sum(-1)
                d_keys[tile.blocks].baddbmm_(d_logits.transpose(1, 2), rows[..., :dim])
                torch.bmm(d_logits, keys[tile.blocks][..., :dim], out=parts.of(tile))
            d_q[chunk.queries] = from_units(parts.sums().mul_(scale), chunk)
            if d_bias is not None and d_block_bias is not None:
                lists = d_block_bias[chunk.lists]
                lists.copy_(d_bias[:-1].view_as(lists))
        return (
            d_q,
            from_blocks(d_k.div_(LOG2_E).flatten(0, 2).flatten(1), k, key_valid),  # the queries hold scale * LOG2_E
            from_blocks(d_v.flatten(0, 2).flatten(1), v, key_valid),
            d_block_bias,
            None,
            None,
            None,
            None,
        )


def _chunks(q: Tensor, k: Tensor, layout: BlockLayout, causal: bool, key_valid: Tensor | None) -> Iterator[_Chunk]:
    """Short sequences several together, long ones list by list; a block meets at most about CHUNK_ROWS rows."""
    batch, lists, groups = layout.indices.shape[:3]
    heads, kv_heads = q.shape[1] // lists, k.shape[1]
    rows = groups * heads * layout.query_group  # of a list
    if rows * lists <= CHUNK_ROWS * kv_heads:
        steps = max(1, CHUNK_ROWS * kv_heads // (rows * lists)), lists, groups
    else:
        steps = 1, 1, max(1, CHUNK_ROWS // (heads * layout.query_group))
    starts = product(*(range(0, n, step) for n, step in zip((batch, lists, groups), steps, strict=True)))
    for first in starts:
        where = tuple(
            slice(x, min(x + step, n)) for x, step, n in zip(first, steps, (batch, lists, groups), strict=True)
        )
        yield _chunk(q, k, layout, causal, key_valid, where)


def _chunk(
    q: Tensor, k: Tensor, layout: BlockLayout, causal: bool, key_valid: Tensor | None, where: tuple[slice, ...]
) -> _Chunk:
    """The chunk of some batch rows, lists and groups."""
    batch, numbers, groups = where
    lists, kv_heads = layout.indices.shape[1], k.shape[1]
    heads = q.shape[1] // lists
    rows = _rows_of(layout, groups)
    where = *where, slice(max(1, int(layout.counts[where].max())))
    tables = batch, slice(numbers.start * kv_heads // lists, (numbers.stop * kv_heads - 1) // lists + 1)
    part = replace(
        layout,
        indices=layout.indices[where],
        counts=layout.counts[where[:3]],
        query_length=rows.stop - rows.start,
        query_offset=layout.query_offset + rows.start,
    )
    units = Units(part, batch.stop - batch.start, heads)
    slots, whole, last = _seen(part, units, causal, q.device)
    row = torch.arange(numbers.start, numbers.stop, device=q.device) * kv_heads // lists
    blocks = _rows_of_table(part, torch.arange(units.batch, device=q.device)[:, None] * kv_heads + row)
    valid = None if key_valid is None else key_valid[batch]
    unseen = unseen_keys(part, units.batch, tables[1].stop - tables[1].start, valid)
    if unseen is not None:
        some = unseen.any(-1).index_select(0, blocks.masked_fill(~slots, 0).flatten())
        whole = whole & ~some.view_as(slots)
    return _Chunk(
        layout=part,
        batch=units.batch,
        heads_per_list=heads,
        queries=(batch, slice(numbers.start * heads, numbers.stop * heads), rows),
        lists=where,
        tables=tables,
        blocks=blocks.flatten(0, 2),
        slots=slots.flatten(0, 2),
        whole=whole.flatten(0, 2),
        last=last,
        unseen=unseen,
    )


def _rows_of(layout: BlockLayout, groups: slice) -> slice:
    """The query rows of some groups; the first and the last group may be cut short."""
    start, stop = (
        (layout.first_group + x) * layout.query_group - layout.query_offset for x in (groups.start, groups.stop)
    )
    return slice(max(0, start), min(layout.query_length, stop))


def _seen(part: BlockLayout, units: Units, causal: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a chunk's lists: entries that somebody sees a key of, entries without hidden pairs, rows' last keys."""
    slots = part.slots
    if not causal:
        return slots, slots, None
    blocks, size, last = part.indices.to(torch.int32), part.block_size, units.last_keys(device)
    seen = slots & (blocks <= (last[:, -1:] // size).to(torch.int32))
    whole = blocks < ((last[:, :1] + 1) // size).to(torch.int32)
    return seen, whole, last.repeat(1, units.heads_per_list)


def _rows_of_table(part: BlockLayout, table: Tensor) -> Tensor:
    """int32, as the lists: where each listed block stands in the block table, given the table of each list."""
    blocks = part.indices.to(torch.int32)
    if table.numel() == 1:
        return blocks
    return blocks + (table * part.num_blocks).to(torch.int32)[:, :, None, None]


def _bias(block_bias: Tensor | None, chunk: _Chunk, dtype: torch.dtype) -> Tensor | None:
    """Of every entry of the chunk's lists, in powers of two, and of the filler."""
    return None if block_bias is None else pad(block_bias.detach()[chunk.lists].flatten().to(dtype) * LOG2_E, (0, 1))


class _Tables:
    """Keys and values block by block, wide enough to compute with, and a 1 each; kept until others are asked for."""

    def __init__(self, k: Tensor, v: Tensor, key_valid: Tensor | None) -> None:
        self._tensors, self._key_valid = (k, v), key_valid
        self._made: tuple[Any, ...] = (None, None)

    def of(self, chunk: _Chunk) -> list[Tensor]:
        """`(block table, block_size, d + 1)` of keys and of values."""
        if self._made[0] != chunk.tables:
            self._made = chunk.tables, [self._table(x[chunk.tables], chunk) for x in self._tensors]
        return self._made[1]

    def _table(self, x: Tensor, chunk: _Chunk) -> Tensor:
        key_valid = None if self._key_valid is None else self._key_valid[chunk.tables[0]]
        blocks = to_blocks(x, key_valid, chunk.layout).unflatten(1, (chunk.layout.block_size, x.shape[-1]))
        return pad(blocks.to(torch.promote_types(x.dtype, torch.float32)), (0, 1), value=1.0)


class _Tiles:
    """The entries of a chunk's lists block by block, cut into tiles.

    Attributes:
        place_of_entry: int64 `(units, width)`: where each entry stands among the tiles' entries; -1 for empty slots.
    """

    def __init__(self, chunk: _Chunk, blocks_at_a_time: int | None = None) -> None:
        self._chunk = chunk
        filler, width = chunk.slots.numel(), chunk.slots.shape[1]
        entries = chunk.slots.flatten().nonzero().squeeze(-1)
        # A counting sort by block; within one, first the entries that hold hidden pairs.
        number = (2 * chunk.blocks + chunk.whole).masked_select(chunk.slots)
        if chunk.num_blocks < 2**14:
            number = number.to(torch.int16)  # sorting pays by the byte
        order = number.sort(stable=True)
        entries = entries.index_select(0, order.indices)
        counts = torch.bincount(order.values, minlength=2)
        counts = pad(counts, (0, len(counts) % 2)).view(-1, 2)
        masked, numbers = counts[:, 0].tolist(), counts.sum(1).tolist()
        self._runs: list[tuple[slice, slice, int]] = []
        shift, taken, total = [0] * len(numbers), 0, 0
        for chosen in _runs(numbers, chunk.rows, blocks_at_a_time):
            most, start = max(numbers[chosen]), total
            for block in range(chosen.start, chosen.stop):
                shift[block] = total - taken
                taken, total = taken + numbers[block], total + most
            self._runs.append((chosen, slice(start, total), max(masked[chosen])))
        # Of every entry in the list sorted by block, its place among the tiles', where short blocks are filled up.
        places = torch.tensor(shift, device=entries.device).index_select(0, order.values.to(torch.int32) >> 1)
        places += torch.arange(len(entries), device=entries.device)
        self._entries = entries.new_full((total,), filler).scatter_(0, places, entries)
        self._units = self._entries // width
        self.place_of_entry = entries.new_full((filler,), -1).scatter_(0, entries, places).view_as(chunk.slots)
        self._keys = torch.arange(chunk.layout.block_size, device=entries.device)

    def __iter__(self) -> Iterator[_Tile]:
        for blocks, places, masked in self._runs:
            number, hidden = blocks.stop - blocks.start, None
            units = self._units[places].view(number, -1)
            if masked:
                block = torch.arange(blocks.start, blocks.stop, device=units.device).repeat_interleave(masked)
                hidden = self._chunk.hidden(units[:, :masked].flatten(), block, self._keys).unflatten(
                    0, (number, masked)
                )
            yield _Tile(blocks, places, self._entries[places].view(number, -1), units, hidden)


class _PartialSums:
    """Tiles' results, added up for the units they belong to, many tiles at a time.

    Adding them up tile by tile (`index_add_`) takes five times as long.
    """

    def __init__(self, sums: Tensor, tiles: _Tiles, memory: list[Tensor]) -> None:
        self._sums, self._tiles, self._memory = sums, tiles, memory
        self._start = self._stop = 0

    def of(self, tile: _Tile) -> Tensor:
        """Where the tile's result belongs, `(blocks, n * rows, d)`; the tiles come one after the other."""
        rows, dim = self._sums.shape[1:]
        if (tile.places.stop - self._start) * rows > PARTIAL_ROWS:
            self._add_up()
        entries = max(PARTIAL_ROWS // rows, tile.places.stop - tile.places.start)
        if not self._memory or self._memory[0].numel() < entries * rows * dim:
            self._memory[:] = [self._sums.new_empty(entries * rows * dim)]
        first = tile.places.start - self._start
        self._stop = tile.places.stop
        part = self._memory[0][first * rows * dim : (self._stop - self._start) * rows * dim]
        return part.view(tile.blocks.stop - tile.blocks.start, -1, dim)

    def sums(self) -> Tensor:
        """`(units, rows, d)`: of all parts."""
        self._add_up()
        return self._sums

    def _add_up(self) -> None:
        if self._stop == self._start:
            return
        places = self._tiles.place_of_entry
        here = (places >= self._start) & (places < self._stop)
        dim = self._sums[0].numel()
        parts = self._memory[0][: (self._stop - self._start) * dim].view(-1, dim)
        ends = pad(here.sum(1).cumsum(0), (1, 0))
        added = embedding_bag(
            places.masked_select(here) - self._start, parts, ends, mode="sum", include_last_offset=True
        )
        self._sums += added.view_as(self._sums)
        self._start = self._stop


def _weighted_sums(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, chunk: _Chunk, memory: list[Tensor]
) -> Tensor:
    """`(units, rows, value_dim + 1)`: values times exp2(logit - reference), and last the sum of those weights."""
    tiles = _Tiles(chunk)
    parts = _PartialSums(queries.new_zeros(len(queries) - 1, chunk.rows, values.shape[-1]), tiles, memory)
    for tile in tiles:
        weights = _hide(_logits(queries, keys, bias, tile)[1], tile, chunk).exp2_()
        torch.bmm(weights, values[tile.blocks], out=parts.of(tile))
    return parts.sums()


def _weighted_sums_with_care(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, chunk: _Chunk
) -> Tensor:
    """The same where logits lie far above their row's reference (in `queries`), which is raised wherever one does."""
    sums = queries.new_zeros(len(queries), chunk.rows, values.shape[-1])
    # A row that chose several blocks of a tile can only have one reference raised at a time.
    for tile in _Tiles(chunk, blocks_at_a_time=1):
        weights = _hide(_raise_references(queries, keys, bias, sums, tile, chunk), tile, chunk).exp2_()
        part = torch.bmm(weights, values[tile.blocks])
        sums.index_add_(0, tile.units.flatten(), part.view(-1, chunk.rows, values.shape[-1]))
    return sums[:-1]


def _with_filler(queries: Tensor) -> Tensor:
    """One more unit, for a tile's empty places: its logits are -inf with every key, so that it weighs nothing."""
    queries = pad(queries, (0, 0, 0, 0, 0, 1))
    queries[-1, :, -1] = -torch.inf
    return queries


def _references(queries: Tensor, keys: Tensor, bias: Tensor | None, chunk: _Chunk) -> Tensor:
    """`(units, rows, 1)`: each row's logit with the first key of its list, or one that it sees; 0 for blind rows.

    A logit of the row itself: however large or small all of them are, its weights neither vanish nor overflow.
    """
    listed, one = chunk.slots[:, 0], torch.zeros(1, dtype=torch.int64, device=queries.device)
    block = chunk.blocks[:, 0] * listed
    first = keys[:, 0, :-1].index_select(0, block)
    reference = (queries * first.unsqueeze(1)).sum(-1)
    if bias is not None:
        reference += bias[:-1].view(len(queries), -1)[:, :1]
    unit = torch.arange(len(queries), device=queries.device)
    hidden = chunk.hidden(unit, block, one).squeeze(-1) | ~listed[:, None] | (reference == -torch.inf)  # by a bias
    reference.masked_fill_(hidden, 0.0)
    # Behind padding, or with only blocks of which it sees the end: the highest logit of the first one it sees any of.
    unit, row = (hidden & chunk.slots.any(1, keepdim=True)).nonzero(as_tuple=True)
    every = torch.arange(chunk.layout.block_size, device=queries.device)
    for slot in range(chunk.slots.shape[1]):
        if not len(unit):
            break
        listed = chunk.slots[unit, slot]
        block = chunk.blocks[unit, slot] * listed
        logits = (keys[block, :, :-1] @ queries[unit, row].unsqueeze(-1)).squeeze(-1)
        unseen = chunk.hidden(unit, block, every).expand(-1, chunk.rows, -1)[torch.arange(len(unit)), row]
        highest = logits.masked_fill(unseen | ~listed[:, None], -torch.inf).amax(-1)
        if bias is not None:
            highest += bias[:-1].view(len(queries), -1)[unit, slot]
        found = highest > -torch.inf
        reference[unit[found], row[found]] = highest[found]
        unit, row = unit[~found], row[~found]
    return reference.unsqueeze(-1)


def _runs(counts: list[int], rows: int, blocks_at_a_time: int | None) -> Iterator[slice]:
    """Consecutive blocks whose units, of so many rows, fill a tile together, without too many empty places."""
    start, step, spare = 0, max(1, TILE_ROWS // rows), FILLING_ROWS // rows
    while start < len(counts):
        stop, most, taken = start + 1, counts[start], counts[start]
        while most and stop < len(counts) and stop - start != blocks_at_a_time:
            wider, more, blocks = max(most, counts[stop]), taken + counts[stop], stop + 1 - start
            if blocks * wider > step or blocks * wider - more > max(FILLING * more, spare):
                break
            most, taken, stop = wider, more, stop + 1
        if most:
            yield slice(start, stop)
        start = stop


def _logits(queries: Tensor, keys: Tensor, bias: Tensor | None, tile: _Tile) -> tuple[Tensor, Tensor]:
    """The tile's rows `(blocks, n * rows, d + 1)`, and their logits in powers of two less the rows' references."""
    rows = queries.index_select(0, tile.units.flatten())
    if bias is not None:
        rows[..., -1] += bias[tile.entries.flatten(), None]
    rows = rows.view(len(tile.units), -1, queries.shape[-1])
    return rows, torch.bmm(rows, keys[tile.blocks].transpose(1, 2))


def _raise_references(
    queries: Tensor, keys: Tensor, bias: Tensor | None, sums: Tensor, tile: _Tile, chunk: _Chunk
) -> Tensor:
    """Raise rows' references to their highest logit so far and adapt their sums; the logits less the new ones."""
    units = tile.units[0]
    old = -queries[units][..., -1:]
    logits = queries[units][..., :-1] @ keys[tile.blocks.start][:, :-1].T
    if bias is not None:
        logits += bias[tile.entries[0], None, None]
    _hide(logits.view(1, -1, logits.shape[-1]), tile, chunk)
    new = torch.maximum(old, logits.amax(-1, keepdim=True))
    sums[units] *= (old - new).exp2()
    queries[units, :, -1:] = -new
    return (logits - new).view(1, -1, logits.shape[-1])


def _hide(logits: Tensor, tile: _Tile, chunk: _Chunk) -> Tensor:
    """Set unseen pairs of `(blocks, n * rows, block_size)` to -inf, in place."""
    if tile.hidden is not None:
        places = logits.view(*tile.units.shape, chunk.rows, -1)
        places[:, : tile.hidden.shape[1]].masked_fill_(tile.hidden, -torch.inf)
    return logits
