"""Summaries of key blocks that outlive a call: what a decoding step need not compute again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from astbench_registry.block_selection.grid import Grid
from astbench_registry.interface import CacheState
from astbench_registry.mask import AttentionMask

Summarise = Callable[[Tensor, Tensor, AttentionMask, Grid], tuple[Tensor, ...] | None]


class BlockSummaries(CacheState):
    """What a variant found out about the blocks of a KV cache, for later calls on the same cache.

    A new one knows nothing; every call that is given it adds to it. It belongs to one layer and one cache: whoever
    changes the cache otherwise than by appending to it, or cutting off its end, starts a new one.

    Attributes:
        blocks: Number of blocks, from the first key on, that it knows.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._tensors: tuple[Tensor, ...] = ()
        self._rows: tuple[int, ...] = ()  # of each tensor a block
        self._valid: Tensor | None = None

    def completed(
        self, k: Tensor, v: Tensor, mask: AttentionMask, grid: Grid, summarise: Summarise
    ) -> tuple[Tensor, ...] | None:
        """`summarise(k, v, mask, grid)`, called only for blocks that are not known yet.

        Under a causal mask a block competes from the token behind it on: what is returned for later ones is finite and
        means nothing.

        Args:
            k: All keys, and `v` the values.
            v: Values.
            mask: Causal, or of another sequence than the queries.
            grid: Groups and blocks.
            summarise: :meth:`BlockSelectingAttention.summarise`; None from it is None from here.
        """
        size, needed = grid.block_size, grid.num_blocks
        # Keys from the first query on are new: whatever was kept of their places (before a cache was cropped) is not.
        self._forget(mask.key_valid, needed if mask.cross else mask.query_offset // size, size)
        if mask.causal:
            last = mask.query_offset + grid.num_groups * grid.query_group - 1
            needed = max(self.blocks, min(k.shape[2], last) // size)
        if not needed:
            return summarise(k, v, mask, grid)
        if self.blocks < needed:
            new = slice(self.blocks * size, needed * size)
            part = replace(mask, key_valid=None if mask.key_valid is None else mask.key_valid[:, new])
            count = needed - self.blocks
            found = summarise(k[:, :, new], v[:, :, new], part, replace(grid, num_blocks=count))
            if found is None:
                return None
            self._add(found, count)
            self._valid = None if mask.key_valid is None else mask.key_valid[:, : needed * size].clone()
        self._reserve(grid.num_blocks, self._tensors)
        return tuple(x[:, :, : grid.num_blocks * each] for x, each in zip(self._tensors, self._rows, strict=True))

    def _forget(self, key_valid: Tensor | None, limit: int, size: int) -> None:
        """Blocks behind the first `limit`, and all where padding has changed."""
        self.blocks = min(self.blocks, limit)
        if self.blocks and self._padding_differs(key_valid, self.blocks * size):
            self.blocks = 0

    def _padding_differs(self, key_valid: Tensor | None, length: int) -> bool:
        if self._valid is None or key_valid is None:
            return not (self._valid is None and key_valid is None)
        return not torch.equal(self._valid[:, :length], key_valid[:, :length])

    def _add(self, new: tuple[Tensor, ...], count: int) -> None:
        """`count` blocks, behind those that are known."""
        known, stop = self.blocks, self.blocks + count
        self._rows = tuple(x.shape[2] // count for x in new)
        if not known:
            self._tensors = ()
        self._reserve(stop, new)
        for kept, x, each in zip(self._tensors, new, self._rows, strict=True):
            kept[:, :, known * each : stop * each] = x
        self.blocks = stop

    def _reserve(self, blocks: int, like: tuple[Tensor, ...]) -> None:
        """Room for that many; twice as much as there was when it has to be made, so that growth costs little."""
        if self._tensors and self._tensors[0].shape[2] >= blocks * self._rows[0]:
            return
        grown = []
        for index, (x, each) in enumerate(zip(like, self._rows, strict=True)):
            with torch.inference_mode(False):  # later steps may be in another mode, and write into it
                room = x.new_zeros(*x.shape[:2], each * (blocks if not self._tensors else 2 * blocks), x.shape[3])
            if self._tensors:
                old = self._tensors[index]
                room[:, :, : old.shape[2]] = old
            grown.append(room)
        self._tensors = tuple(grown)
