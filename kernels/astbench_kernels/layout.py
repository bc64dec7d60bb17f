"""Which key blocks each group of queries attends to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

FEW_BLOCKS = 2**12
"""Of so many a decoding step's lists are made by sorting: two to three times as fast as by counting."""


def ceil_div(a: int, b: int) -> int:
    """Integer division, rounded up."""
    return -(-a // b)


def last_key(position: Tensor, key_stride: int) -> Tensor:
    """The last key that a query at each position sees under a causal mask, -1 where it sees none."""
    return (position + 1) // key_stride - 1


@dataclass(frozen=True)
class BlockLayout:
    """Lists of chosen key blocks, one list per (batch, list head, query group).

    Positions are absolute: query row `i` stands at position `query_offset + i`, key row `j` at
    `(j + 1) * key_stride - 1`. With a stride of 1 that is `j`; a coarse key sums up `key_stride` consecutive tokens
    and stands at the last of them, so that a causal mask shows it once they are all there. Query groups are aligned
    to absolute positions too (group of a row = position // query_group), so a decoding step that starts in the middle
    of a group still finds its own list.

    Attributes:
        indices: int32 `(batch, list_heads, groups, width)`; the first `counts` entries of a row are distinct
            block numbers in any order, the rest are padding and never read as blocks.
        counts: int32 `(batch, list_heads, groups)`.
        block_size: Keys per block; the last block may be shorter.
        query_group: Consecutive query positions that share a list.
        query_length: Number of query rows.
        key_length: Number of key rows.
        query_offset: Absolute position of query row 0.
        key_stride: Consecutive tokens that a key stands for; 1 unless keys are coarse.
        since: Integers as `indices`, 0 to `query_group`: the first row of its group, counted from the group's first
            position, that sees the entry's block; every later one does. A causal list that grows within its group is
            *carried*: a block that one row chose is seen by that row and the rows behind it. None: all rows see all.
    """

    indices: Tensor
    counts: Tensor
    block_size: int
    query_group: int
    query_length: int
    key_length: int
    query_offset: int = 0
    key_stride: int = 1
    since: Tensor | None = None
    _sound: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)
    _first_rows: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("key_stride", 1), ("block_size", 1), ("query_group", 1), ("query_offset", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least} token, got {getattr(self, name)}")
        if self.indices.dim() != 4 or self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                "indices must be (batch, list_heads, groups, width) and counts (batch, list_heads, groups), "
                f"got {tuple(self.indices.shape)} and {tuple(self.counts.shape)}"
            )
        if self.since is not None and self.since.shape != self.indices.shape:
            raise ValueError(f"since {tuple(self.since.shape)} must align with indices {tuple(self.indices.shape)}")
        if self.indices.shape[2] != self.num_groups:
            raise ValueError(
                f"expected {self.num_groups} query groups of {self.query_group} for queries "
                f"{self.query_offset}..{self.query_offset + self.query_length - 1}, got {self.indices.shape[2]}"
            )

    @property
    def sound(self) -> bool:
        """The lists were made by this class and not written into since: each names blocks that there are, once."""
        return self._sound is not None and self._sound == _versions(self.indices, self.counts, self.since)

    def _made(self) -> BlockLayout:
        """The same, its lists known to be sound; :func:`dataclasses.replace` forgets it."""
        object.__setattr__(self, "_sound", _versions(self.indices, self.counts, self.since))
        return self

    @property
    def num_blocks(self) -> int:
        """Number of key blocks, the last perhaps short."""
        return ceil_div(self.key_length, self.block_size)

    @property
    def first_group(self) -> int:
        """Absolute number of the group of query row 0."""
        return self.query_offset // self.query_group

    @property
    def num_groups(self) -> int:
        """Query groups touched by the rows."""
        return ceil_div(self.query_offset + self.query_length, self.query_group) - self.first_group

    @property
    def slots(self) -> Tensor:
        """Bool `(batch, list_heads, groups, width)`: which entries of `indices` are blocks."""
        width = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return width < self.counts.unsqueeze(-1)

    @staticmethod
    def from_mask(
        keep: Tensor,
        *,
        block_size: int,
        query_group: int,
        query_length: int,
        key_length: int,
        query_offset: int = 0,
        key_stride: int = 1,
    ) -> BlockLayout:
        """Build lists from a bool `(batch, list_heads, groups, key_blocks)`; blocks in ascending order.

        Cost: O(groups x key_blocks) time and memory.
        """
        with torch.inference_mode(False):  # where it is seen that nobody writes into them
            indices, counts = _lists_of(keep)
        shape = (block_size, query_group, query_length, key_length, query_offset, key_stride)
        return BlockLayout(indices, counts, *shape)._made()

    @staticmethod
    def carried(
        keep: Tensor,
        *,
        block_size: int,
        query_group: int,
        query_length: int,
        key_length: int,
        query_offset: int = 0,
        before: Tensor | None = None,
    ) -> BlockLayout:
        """Carried lists from what each row keeps, bool `(batch, list_heads, query_length, key_blocks)`.

        Args:
            keep: Blocks that each query row chose.
            block_size: As the attribute.
            query_group: Consecutive positions that share and carry a list.
            query_length: As the attribute.
            key_length: As the attribute.
            query_offset: As the attribute.
            before: Integers `(batch, list_heads, key_blocks)`: the rows of the first group that chose each block in
                front of row 0, as in :meth:`first_rows`; None where row 0 begins a group.

        Cost: O(query_length x key_blocks) time; memory for as many bytes.
        """
        with torch.inference_mode(False):
            first = _first_rows(keep, query_offset, query_group)
            if before is not None and first.shape[2]:
                first[:, :, 0] = torch.minimum(first[:, :, 0], before)
            indices, counts = _lists_of(first < query_group)
            hidden = torch.arange(indices.shape[-1], device=keep.device) >= counts.unsqueeze(-1)
            since = first.gather(-1, indices.long()).masked_fill_(hidden, 0) if keep.shape[-1] else indices
        layout = BlockLayout(indices, counts, block_size, query_group, query_length, key_length, query_offset, 1, since)
        layout = layout._made()
        if keep.shape[2] == 1:  # the next step of decoding asks for them
            object.__setattr__(layout, "_first_rows", first)
        return layout

    @staticmethod
    @torch.inference_mode(False)
    def joined(parts: Sequence[BlockLayout], key_length: int) -> BlockLayout:
        """The lists of consecutive queries as one layout.

        Args:
            parts: In the order of their queries; each begins where a group does, but for the first.
            key_length: Of the whole.
        """
        first, width = parts[0], max(part.indices.shape[-1] for part in parts)

        def together(tensors: list[Tensor]) -> Tensor:
            return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in tensors], 2)

        since = [part.since for part in parts if part.since is not None]
        whole = replace(
            first,
            indices=together([part.indices for part in parts]),
            counts=torch.cat([part.counts for part in parts], 2),
            since=together(since) if since else None,
            query_length=sum(part.query_length for part in parts),
            key_length=key_length,
        )
        return whole._made() if all(part.sound for part in parts) else whole

    def first_rows(self) -> Tensor:
        """int32 `(batch, list_heads, groups, key_blocks)`: the first row of a group that sees each block.

        `query_group` for blocks that are not listed. Not to be written into.
        """
        if self._first_rows is not None and self.sound:
            return self._first_rows
        table = torch.full(
            (*self.counts.shape, self.num_blocks + 1), self.query_group, dtype=torch.int32, device=self.indices.device
        )
        index = torch.where(self.slots, self.indices, self.num_blocks).long()
        since = torch.zeros_like(self.indices) if self.since is None else self.since
        return table.scatter(-1, index, since.to(torch.int32))[..., :-1]

    def to_mask(self) -> Tensor:
        """Bool `(batch, list_heads, groups, key_blocks)`, the inverse of :meth:`from_mask`."""
        keep = torch.zeros(*self.counts.shape, self.num_blocks + 1, dtype=torch.bool, device=self.indices.device)
        index = torch.where(self.slots, self.indices, self.num_blocks).long()
        return keep.scatter_(-1, index, True)[..., :-1]

    def row_groups(self) -> Tensor:
        """int64 `(query_length,)`: which group (counted from 0 in this layout) each query row belongs to."""
        position = torch.arange(self.query_length, device=self.indices.device) + self.query_offset
        return position // self.query_group - self.first_group

    def row_offsets(self) -> Tensor:
        """int64 `(query_length,)`: each query row's place in its group, what `since` counts."""
        return (torch.arange(self.query_length, device=self.indices.device) + self.query_offset) % self.query_group

    def token_mask(self, *, causal: bool, key_valid: Tensor | None = None) -> Tensor:
        """Bool `(batch, list_heads, query_length, key_length)`: the exact pairs this layout attends to.

        Cost: O(query_length x key_length); for tests, pictures and the reference.
        """
        device = self.indices.device
        block_of_key = torch.arange(self.key_length, device=device) // self.block_size
        first = self.first_rows()[:, :, self.row_groups()]
        keep = (first <= self.row_offsets()[:, None])[..., block_of_key]
        if causal:
            position = torch.arange(self.query_length, device=device)[:, None] + self.query_offset
            keep = keep & (torch.arange(self.key_length, device=device) <= last_key(position, self.key_stride))
        if key_valid is not None:
            keep = keep & key_valid[:, None, None, :]
        return keep

    def attended_pairs(self, *, causal: bool, key_valid: Tensor | None = None) -> Tensor:
        """float64 `(batch, list_heads)`: how many (query, key) pairs are attended to.

        Cost: O(query_length x width) time, causal, else O(groups x width); no `N x M` tensor.
        """
        device = self.indices.device
        batch = self.indices.shape[0]
        valid = (
            torch.ones(batch, self.key_length, device=device, dtype=torch.int64)
            if key_valid is None
            else key_valid.long().expand(batch, -1)
        )
        # seen[b, j] = valid keys before position j
        seen = torch.cat([torch.zeros(batch, 1, dtype=torch.int64, device=device), valid.cumsum(1)], dim=1)
        start = self.indices.long() * self.block_size  # (batch, list_heads, groups, width)
        stop = (start + self.block_size).clamp(max=self.key_length)
        total = torch.zeros(self.counts.shape[:2], dtype=torch.float64, device=device)
        groups = self.row_groups()
        if not causal and self.since is None:  # the rows of a group see the same keys
            bounds = (edge.clamp(max=self.key_length) for edge in (start, stop))
            first, end = (_look_up(seen, edge) for edge in bounds)
            rows_of = groups.bincount(minlength=start.shape[2])
            return (((end - first) * self.slots).sum(-1) * rows_of).sum(-1, dtype=torch.float64)
        last = torch.full_like(groups, self.key_length - 1)
        if causal:
            last = last_key(torch.arange(self.query_length, device=device) + self.query_offset, self.key_stride)
        offsets = self.row_offsets()
        rows_per_step = max(1, 2**22 // max(1, start[:, :, 0].numel()))
        for rows in torch.arange(self.query_length, device=device).split(rows_per_step):
            begin, end = start[:, :, groups[rows]], stop[:, :, groups[rows]]
            end = torch.minimum(end, last[rows, None] + 1).maximum(begin)
            begin = begin.clamp(max=self.key_length)
            end = end.clamp(max=self.key_length)
            per_slot = _look_up(seen, end) - _look_up(seen, begin)
            slots = self.slots[:, :, groups[rows]]
            if self.since is not None:
                slots = slots & (self.since[:, :, groups[rows]] <= offsets[rows, None])
            total += (per_slot * slots).sum((-1, -2), dtype=torch.float64)
        return total

    def tiles(self, *, causal: bool) -> tuple[Tensor, int]:
        """What a kernel that works tile by tile has to compute, and could at most.

        Returns:
            float64 `(batch, list_heads)`: listed tiles of `query_group` rows by one block that hold a pair which a
            causal mask shows; and how many such tiles there are. Padding is not looked at.
        """
        start = torch.arange(self.num_blocks, device=self.indices.device) * self.block_size
        group = torch.arange(self.num_groups, device=self.indices.device) + self.first_group
        last = ((group + 1) * self.query_group - 1).clamp(max=self.query_offset + self.query_length - 1)
        seen = torch.ones(self.num_groups, self.num_blocks, dtype=torch.bool, device=start.device)
        if causal:
            seen = start <= last_key(last, self.key_stride)[:, None]
        return (self.to_mask() & seen).sum((-1, -2), dtype=torch.float64), int(seen.sum())

    def density(self, *, causal: bool, key_valid: Tensor | None = None) -> Tensor:
        """float64 `(batch, list_heads)`: attended pairs over visible pairs, 1.0 where nothing is visible."""
        everything = visible_pairs(
            self.query_length,
            self.key_length,
            causal=causal,
            query_offset=self.query_offset,
            key_stride=self.key_stride,
            key_valid=key_valid,
            batch=self.indices.shape[0],
            device=self.indices.device,
        )
        pairs = self.attended_pairs(causal=causal, key_valid=key_valid)
        return torch.where(everything[:, None] > 0, pairs / everything[:, None].clamp(min=1), 1.0)

    @torch.inference_mode(False)
    def expand_heads(self, num_heads: int) -> BlockLayout:
        """Repeat each list for the consecutive heads that share it."""
        repeats = num_heads // self.indices.shape[1]
        expanded = replace(
            self,
            indices=self.indices.repeat_interleave(repeats, 1),
            counts=self.counts.repeat_interleave(repeats, 1),
            since=None if self.since is None else self.since.repeat_interleave(repeats, 1),
        )
        return expanded._made() if self.sound else expanded


def _lists_of(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Both int32: the blocks `(batch, list_heads, groups, width)` in ascending order, and how many they are."""
    blocks = keep.shape[-1]
    if keep.shape[2] == 1 and 0 < keep.numel() <= FEW_BLOCKS:
        counts = keep.sum(-1, dtype=torch.int32)
        width = max(1, int(counts.max()))
        first = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
        slots = torch.arange(width, device=keep.device) < counts.unsqueeze(-1)
        return first.to(torch.int32).mul_(slots), counts
    kept = keep.reshape(-1).nonzero().squeeze(-1)
    counts = torch.bincount(kept // max(1, blocks), minlength=math.prod(keep.shape[:-1])).to(torch.int32)
    counts = counts.view(keep.shape[:-1])
    width = max(1, int(counts.max())) if counts.numel() else 1
    indices = torch.zeros(*counts.shape, width, dtype=torch.int32, device=keep.device)
    # Both masks are read row by row: the kept blocks fall into their row's first slots, in ascending order.
    slots = torch.arange(width, device=keep.device) < counts.unsqueeze(-1)
    return indices.masked_scatter_(slots, (kept % max(1, blocks)).to(torch.int32)), counts


def _first_rows(keep: Tensor, offset: int, group: int) -> Tensor:
    """int32 `(batch, list_heads, groups, key_blocks)`: the first row of each group that keeps a block, or `group`."""
    length, lead = keep.shape[2], offset % group
    if length == 1:
        return torch.where(keep, lead, group).to(torch.int32)
    groups = ceil_div(offset + length, group) - offset // group
    tail = groups * group - lead - length
    rows = torch.nn.functional.pad(keep, (0, 0, lead, tail)).unflatten(2, (groups, group))
    # The first row is that with the most rows from it to the end; a product of bytes is faster than any choice.
    small = torch.uint8 if group < 2**8 else torch.int32
    left = torch.arange(group, 0, -1, device=keep.device, dtype=small)[:, None]
    most = (rows.to(small) * left).amax(3) if rows.numel() else rows.new_zeros(0, dtype=small)
    return group - most.view(*keep.shape[:2], groups, keep.shape[-1]).to(torch.int32)


def visible_pairs(
    query_length: int,
    key_length: int,
    *,
    causal: bool,
    query_offset: int,
    key_valid: Tensor | None,
    batch: int,
    device: torch.device,
    key_stride: int = 1,
) -> Tensor:
    """float64 `(batch,)`: the (query, key) pairs that a dense attention would compute."""
    position = torch.arange(query_length, device=device) + query_offset
    stop = torch.full_like(position, key_length)
    if causal:
        stop = torch.minimum(stop, last_key(position, key_stride) + 1)
    if key_valid is None:
        return stop.sum(dtype=torch.float64).expand(batch)
    seen = torch.nn.functional.pad(key_valid.long().cumsum(1), (1, 0))
    return seen[:, stop].sum(1, dtype=torch.float64)


def _versions(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """How often each was written into; None in inference mode, where nobody counts."""
    given = [x for x in tensors if x is not None]
    return None if any(x.is_inference() for x in given) else tuple(x._version for x in given)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Table `(batch, n)` read at index `(batch, ...)`."""
    return table.gather(1, index.flatten(1)).view(index.shape)
