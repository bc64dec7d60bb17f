"""Carried lists: what one row of a tile chose is seen by it and by the rows behind it in the tile.

Every row chooses for itself, so nothing depends on later tokens; but the rows of a tile share one list, as a kernel
that works tile by tile wants it. Decoding has to know what the rows before it in its tile chose, whose queries are
gone: that is kept beside the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels import BlockLayout
from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.grid import Selection


class RunningList:
    """The list of the tile that a KV cache ends in, for the next call on it.

    A cache may have been cropped since, or its sequences put into another order (beam search). Then each sequence is
    found again by its keys of the tile's rows.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # (batch, lists, blocks): first row of the tile that chose each block
        self._keys: Tensor | None = None  # (batch, kv_heads, rows, head_dim): of the tile's rows so far
        self._start = 0  # position of the tile's first row
        self._stop = 0  # position behind the last row that it knows
        self._doubtful = False

    def doubt(self) -> None:
        """The cache may hold other sequences than it did."""
        self._doubtful = True

    def take(self, other: RunningList, rows: list[int]) -> None:
        """Begin with the lists of some sequences of another, where it has any."""
        if other._first is not None and other._keys is not None and len(other._first) > max(rows):
            self._first, self._keys = other._first[rows], other._keys[rows]
            self._start, self._stop, self._doubtful = other._start, other._stop, other._doubtful

    def before(self, call: Call, tile: int) -> Tensor | None:
        """`(batch, lists, key_blocks)`, as :meth:`BlockLayout.carried` takes it; None where it is not known."""
        offset = call.mask.query_offset
        start, first, keys = offset - offset % tile, self._first, self._keys
        if first is None or keys is None or self._start != start or keys.shape[2] < offset - start:
            return None
        if self._doubtful:
            now, known = call.k[:, :, start:offset], keys[:, :, : offset - start]
            same = torch.stack([(known == row).flatten(1).all(1) for row in now])  # (batch now, batch then)
            if not bool(same.any(1).all()):
                return None
            first = first[same.to(torch.uint8).argmax(1)]
        elif len(first) != len(call.k):
            return None
        if offset == self._stop:
            return first
        return torch.where(first >= offset - start, tile, first)  # of rows that a cropped cache has no more: nothing

    def remember(self, call: Call, layout: BlockLayout) -> None:
        """What the last tile of a call chose, unless it is complete."""
        stop, tile = call.mask.query_offset + call.q.shape[2], layout.query_group
        self._first, self._keys, self._doubtful = None, None, False
        if stop % tile:
            self._start, self._stop = stop - stop % tile, stop
            self._first = layout.first_rows()[:, :, -1]
            self._keys = call.k[:, :, self._start : stop].clone()


def carried_layout(
    keep: Tensor, call: Call, selection: Selection, tile: int, running: RunningList | None
) -> BlockLayout:
    """Lists of tiles of `tile` rows.

    Args:
        keep: Bool `(batch, lists, query_length, blocks)`: what each row chose.
        call: Causal self-attention.
        selection: What there was a choice among, a group a row.
        tile: Rows.
        running: What is kept beside the cache; None for nothing.

    Raises:
        ValueError: the call begins inside a tile, and what its first rows chose was not kept.
    """
    offset, before = call.mask.query_offset, None
    if offset % tile:
        before = None if running is None else running.before(call, tile)
        if before is None:
            raise ValueError(
                f"decoding from position {offset} needs what the rows before it in its tile of {tile} chose, and that "
                "was not kept: keep one KV cache from the prompt on, without gradients, or set --attention.lists=own"
            )
        blocks = selection.num_blocks
        if before.shape[-1] != blocks:
            before = pad(before[..., :blocks], (0, max(0, blocks - before.shape[-1])), value=tile)
    real = call.mask.valid_queries(call.q.shape[2])
    if real is not None:  # padding chooses nothing for those behind it
        keep = keep & real[:, None, :, None]
    layout = BlockLayout.carried(
        keep,
        block_size=selection.block_size,
        query_group=tile,
        query_length=call.q.shape[2],
        key_length=call.k.shape[2],
        query_offset=offset,
        before=before,
    )
    if running is not None:
        running.remember(call, layout)
    return layout
