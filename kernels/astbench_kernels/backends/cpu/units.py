"""Queries by lists and keys by blocks: how the plain-torch schedules lay a call out.

A unit is one list, `(batch, list head, query group)`, with the query rows that share it; the block table holds every
key block of every batch row and key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from astbench_kernels.layout import BlockLayout, ceil_div, last_key

LOG2_E = math.log2(math.e)
"""Logits are kept in powers of two: torch's exp2 is two to three times as fast as its exp."""


@dataclass
class Units:
    """How the query rows of a call, or of a chunk of one, belong to lists."""

    layout: BlockLayout
    batch: int
    heads_per_list: int

    @property
    def rows(self) -> int:
        """Query rows of a unit."""
        return self.heads_per_list * self.layout.query_group

    def places(self, device: torch.device) -> Tensor:
        """int64 `(rows,)`: each row's place in its query group."""
        return torch.arange(self.layout.query_group, device=device).repeat(self.heads_per_list)

    def last_keys(self, device: torch.device) -> Tensor:
        """int64 `(groups, query_group)`: the last key that a causal mask shows to each query position."""
        layout = self.layout
        first = (layout.first_group + torch.arange(layout.num_groups, device=device)) * layout.query_group
        return last_key(first[:, None] + torch.arange(layout.query_group, device=device), layout.key_stride)


@dataclass
class ListedUnits(Units):
    """Everything about a call but the tensors that need gradients.

    Units go from the shortest list to the longest, so that few are filled up when some are computed together. In each
    list the blocks come first that hold keys which not every row may see; those that no row sees are not there.
    """

    scale: float
    causal: bool
    counts: list[int]  # blocks of each unit's list
    order: Tensor  # int64 (units,): each one's number
    slots: Tensor  # int64 (units, width): where each of its blocks stands in the layout
    blocks: Tensor  # int32 (units, width): rows of the block table
    partial: Tensor  # int64 (units,): how many of them have hidden keys
    starts: Tensor  # int32 (units, width): each listed block's first key
    since: Tensor  # int32 (units, width): the first place of a row that sees a block, past all for empty slots
    last: Tensor  # int64 (groups, rows): the last key that a causal mask shows to each query row of a unit
    unseen: Tensor | None  # bool (block table, block_size): keys that nobody may see; None where there are none

    def in_order(self, x: Tensor) -> Tensor:
        """`(units, width)` as the layout has it -> as it stands here."""
        return x[self.order].gather(1, self.slots)

    def hidden(self, units: slice) -> Tensor | None:
        """Bool, broadcastable to `(units, rows, n, block_size)`: pairs of the first n blocks that may not be seen.

        None where every row may see all of its blocks.
        """
        first, size = int(self.partial[units].max()), self.layout.block_size
        if not first:
            return None
        hidden = torch.zeros((), dtype=torch.bool, device=self.starts.device)
        if self.unseen is not None:
            hidden = self.unseen[self.blocks[units, :first]].unsqueeze(1)
        if self.causal:
            last = (
                self.last[self.order[units] % self.layout.num_groups].unsqueeze(-1) - self.starts[units, None, :first]
            )
            small = torch.int16 if size < 2**15 else torch.int64  # of which more fit in a vector instruction
            keys = torch.arange(size, device=last.device, dtype=small)
            hidden = hidden | (keys > last.clamp_(-1, size).to(small).unsqueeze(-1))
        return hidden

    def too_early(self, units: slice, width: int) -> tuple[Tensor, int] | None:
        """Bool `(units, rows, n)`: rows in front of the one that a carried block came with, and empty slots.

        Of the last n of `width` slots, and how many there are before them; None where there is no such row.
        """
        since = self.since[units, :width]
        some = since.amax(0).nonzero()
        if not len(some):
            return None
        first = int(some[0])
        return self.places(since.device).to(torch.int32)[:, None] < since[:, None, first:], first


def one_list_per_kv_head(layout: BlockLayout, num_heads: int, num_kv_heads: int) -> BlockLayout:
    """At least; the layout itself when it has one per query head."""
    return layout if layout.indices.shape[1] in (num_kv_heads, num_heads) else layout.expand_heads(num_kv_heads)


def unseen_keys(layout: BlockLayout, batch: int, kv_heads: int, key_valid: Tensor | None) -> Tensor | None:
    """Bool `(block table, block_size)`: keys that nobody may see, padding and what is behind the end; None for none."""
    size = layout.block_size
    if key_valid is None and not layout.key_length % size:
        return None
    device = layout.indices.device
    valid = torch.ones(1, layout.key_length, dtype=torch.bool, device=device) if key_valid is None else key_valid
    valid = torch.nn.functional.pad(valid, (0, layout.num_blocks * size - layout.key_length)).expand(batch, -1)
    return ~valid.view(batch, 1, layout.num_blocks, size).expand(-1, kv_heads, -1, -1).reshape(-1, size)


def listed_units(
    q: Tensor, k: Tensor, layout: BlockLayout, scale: float, causal: bool, key_valid: Tensor | None
) -> ListedUnits:
    """Of a call; the layout has a list per head or per key/value head."""
    batch, num_heads, _, _ = q.shape
    kv_heads, lists = k.shape[1], layout.indices.shape[1]
    width, size = layout.indices.shape[-1], layout.block_size
    listed = layout.indices.to(torch.int32).masked_fill(~layout.slots, 0)
    kv_head_of_list = torch.arange(lists, device=q.device) * kv_heads // lists
    row = (torch.arange(batch, device=q.device)[:, None] * kv_heads + kv_head_of_list).to(torch.int32)
    last = Units(layout, batch, num_heads // lists).last_keys(q.device)
    starts = (listed * size).reshape(-1, width)
    blocks = (listed + row[:, :, None, None] * layout.num_blocks).reshape(-1, width)
    slots = layout.slots.reshape(-1, width)
    if causal:  # blocks that nobody sees yet are not there
        slots = slots & (starts <= last[:, -1].repeat(batch * lists)[:, None])
    since = torch.zeros_like(starts)
    if layout.since is not None:
        since = layout.since.reshape(-1, width).to(torch.int32)
        group = torch.arange(layout.num_groups, device=q.device) + layout.first_group
        rows = (layout.query_offset + layout.query_length - group * layout.query_group).clamp(max=layout.query_group)
        slots = slots & (since < rows.repeat(batch * lists)[:, None])
    masked = torch.zeros_like(slots)
    if causal:
        masked = starts + size - 1 > last[:, 0].repeat(batch * lists)[:, None]
    unseen = unseen_keys(layout, batch, kv_heads, key_valid)
    if unseen is not None:
        masked = masked | unseen.any(-1).index_select(0, blocks.flatten()).view_as(masked)
    masked = masked & slots
    counts, order = slots.sum(1).sort(stable=True)
    kind = masked.to(torch.uint8) + slots.to(torch.uint8)
    plan = ListedUnits(
        layout=layout,
        batch=batch,
        heads_per_list=num_heads // lists,
        scale=scale,
        causal=causal,
        counts=counts.tolist(),
        order=order,
        slots=kind[order].sort(stable=True, dim=1, descending=True).indices,
        blocks=blocks,
        partial=masked.sum(1)[order],
        starts=starts,
        since=since.masked_fill(~slots, layout.query_group),
        last=last.repeat(1, num_heads // lists),
        unseen=unseen,
    )
    for name in ("blocks", "starts", "since"):
        setattr(plan, name, plan.in_order(getattr(plan, name)))
    return plan


def in_numbers(x: Tensor, plan: ListedUnits) -> Tensor:
    """Rows in the order of the lists' lengths -> in that of the units' numbers."""
    return torch.empty_like(x).index_copy_(0, plan.order, x)


def to_units(x: Tensor, plan: Units, value: float = 0.0) -> Tensor:
    """`(batch, heads, query_length, d)` -> `(units, rows, d)`, `value` where a group sticks out of the queries."""
    layout, lists = plan.layout, plan.layout.indices.shape[1]
    lead = layout.query_offset % layout.query_group
    tail = layout.num_groups * layout.query_group - lead - layout.query_length
    if lead or tail:
        x = torch.nn.functional.pad(x, (0, 0, lead, tail), value=value)
    x = x.reshape(plan.batch, lists, plan.heads_per_list, layout.num_groups, layout.query_group, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, plan.rows, x.shape[-1])


def from_units(x: Tensor, plan: Units) -> Tensor:
    """The inverse of :func:`to_units`."""
    layout, lists = plan.layout, plan.layout.indices.shape[1]
    lead = layout.query_offset % layout.query_group
    x = x.view(plan.batch, lists, layout.num_groups, plan.heads_per_list, layout.query_group, x.shape[-1])
    x = x.transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return x[:, :, lead : lead + layout.query_length]


def to_blocks(x: Tensor, key_valid: Tensor | None, layout: BlockLayout) -> Tensor:
    """`(batch, kv_heads, key_length, d)` -> `(block table, block_size * d)`, unseen keys zeroed."""
    if key_valid is not None:
        # Padding may hold NaN; a zero weight would keep it.
        x = x.masked_fill(~key_valid[:, None, :, None], 0.0)
    missing = layout.num_blocks * layout.block_size - layout.key_length
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, layout.block_size * x.shape[-1])


def from_blocks(x: Tensor, like: Tensor, key_valid: Tensor | None) -> Tensor:
    """The inverse of :func:`to_blocks`, in the dtype of `like`; padding gets no gradient."""
    batch, heads, length, dim = like.shape
    size = x.shape[1] // dim
    x = x.view(batch, heads, ceil_div(length, size) * size, dim)[:, :, :length].to(like.dtype)
    return x if key_valid is None else x.masked_fill(~key_valid[:, None, :, None], 0.0)


def lists_together(counts: list[int], bytes_per_block: int, most: int) -> Iterator[tuple[slice, int]]:
    """Runs of units with the width of the longest list among them; units without keys are left out.

    Args:
        counts: Blocks of each unit's list, in ascending order.
        bytes_per_block: What one of them takes.
        most: Bytes of a run, but for one list; of what shorter lists are filled up with an eighth of that.
    """
    start = sum(count == 0 for count in counts)
    while start < len(counts):
        stop, listed = start + 1, counts[start]
        while stop < len(counts):
            width, more = counts[stop], listed + counts[stop]
            whole = (stop + 1 - start) * width
            if whole * bytes_per_block > most or (whole - more) * bytes_per_block > most // 8:
                break
            stop, listed = stop + 1, more
        yield slice(start, stop), counts[stop - 1]
        start = stop


class Scratch:
    """Memory that every chunk of a call uses again: fresh pages cost as much as the work on them."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """That is computed in."""
        return self._like.dtype

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised memory, that of the last call of the same name where it is large enough."""
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = self._like.new_empty(size, dtype=dtype)
        return self._flat[name][:size].view(shape)

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """torch.bmm."""
        return torch.bmm(a, b, out=self.take(name, a.dtype, a.shape[0], a.shape[1], b.shape[2]))

    def gather(self, name: str, blocks: Tensor, index: Tensor, units: slice, dim: int) -> Tensor:
        """`(units, keys, dim)`: the listed rows of a block table, wide enough to compute with."""
        rows = self.take(name, blocks.dtype, len(index), blocks.shape[1])
        torch.index_select(blocks, 0, index, out=rows)
        return rows.view(units.stop - units.start, -1, dim).to(self._like.dtype)
