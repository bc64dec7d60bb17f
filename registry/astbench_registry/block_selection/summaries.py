"""Block features that outlive a call: what a decoding step need not compute again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.carried import RunningList
from astbench_registry.block_selection.features import BlockFeatures
from astbench_registry.block_selection.grid import Grid
from astbench_registry.interface import CacheState

T = TypeVar("T")
FeaturesOf = Callable[[Call, Grid], BlockFeatures]


class BlockSummaries(CacheState):
    """The features of a KV cache's blocks, for later calls on the same cache.

    A new one knows nothing; every call that is given it adds to it. It belongs to one layer and one cache: whoever
    changes the cache otherwise than by appending to it, or cutting off its end, starts a new one.

    Attributes:
        blocks: Number of blocks, from the first key on, that it knows.
        running: What rows of the tile chose that the cache ends in, for carried lists.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.running = RunningList()
        self._tensors: dict[str, Tensor] = {}  # by the features' names; with room behind the last block
        self._rows: dict[str, int] = {}  # of each tensor a block
        self._valid: Tensor | None = None
        self._once: dict[str, tuple[Hashable, Any]] = {}

    def once(self, name: str, of: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, kept for later steps of decoding until blocks come or go, or `of` is another.

        It may depend on completed blocks, weights and `of`.
        """
        known = self._once.get(name)
        if known is None or known[0] != of:
            self._once[name] = known = (of, make())
        found: T = known[1]
        return found

    def take(self, other: CacheState, rows: list[int]) -> None:
        """See the base class: the running list. Features of blocks can be made anew."""
        if isinstance(other, BlockSummaries):
            self.running.take(other.running, rows)

    def doubt(self) -> None:
        """See the base class: features are made anew, the running list is looked at."""
        super().doubt()
        self.blocks = 0
        self._once.clear()
        self.running.doubt()

    def completed(self, call: Call, grid: Grid, features_of: FeaturesOf) -> BlockFeatures:
        """`features_of(call, grid)`, called only for blocks that are not known yet.

        Under a causal mask a block competes from the token behind it on: what is returned for later ones is finite and
        means nothing.

        Args:
            call: With all keys and values; its mask causal, or of another sequence than the queries.
            grid: Groups and blocks.
            features_of: Computes the features of all blocks of a call.
        """
        mask, size, needed = call.mask, grid.block_size, grid.num_blocks
        # Keys from the first query on are new: whatever was kept of their places (before a cache was cropped) is not.
        self._forget(mask.key_valid, needed if mask.cross else mask.query_offset // size, size)
        if mask.causal:
            last = mask.query_offset + grid.num_groups * grid.query_group - 1
            needed = max(self.blocks, min(call.k.shape[2], last) // size)
        if not needed:
            return features_of(call, grid)
        if self.blocks < needed:
            new = slice(self.blocks * size, needed * size)
            part = replace(mask, key_valid=None if mask.key_valid is None else mask.key_valid[:, new])
            count = needed - self.blocks
            behind = replace(call, k=call.k[:, :, new], v=call.v[:, :, new], mask=part)
            self._add(features_of(behind, replace(grid, num_blocks=count)), count)
            self._valid = None if mask.key_valid is None else mask.key_valid[:, : needed * size].clone()
        self._reserve(grid.num_blocks, self._tensors)
        return BlockFeatures(
            **{name: x[:, :, : grid.num_blocks * self._rows[name]] for name, x in self._tensors.items()}
        )

    def _forget(self, key_valid: Tensor | None, limit: int, size: int) -> None:
        """Blocks behind the first `limit`, and all where padding has changed."""
        known, self.blocks = self.blocks, min(self.blocks, limit)
        if self.blocks and self._padding_differs(key_valid, self.blocks * size):
            self.blocks = 0
        if self.blocks < known:
            self._once.clear()

    def _padding_differs(self, key_valid: Tensor | None, length: int) -> bool:
        if self._valid is None or key_valid is None:
            return not (self._valid is None and key_valid is None)
        return not torch.equal(self._valid[:, :length], key_valid[:, :length])

    def _add(self, features: BlockFeatures, count: int) -> None:
        """`count` blocks, behind those that are known."""
        self._once.clear()
        new = {name: x for name, x in features._asdict().items() if x is not None}
        known, stop = self.blocks, self.blocks + count
        self._rows = {name: x.shape[2] // count for name, x in new.items()}
        if not known:
            self._tensors = {}
        self._reserve(stop, new)
        for name, x in new.items():
            rows = self._rows[name]
            self._tensors[name][:, :, known * rows : stop * rows] = x
        self.blocks = stop

    def _reserve(self, blocks: int, like: dict[str, Tensor]) -> None:
        """Room for that many; twice as much as there was when it has to be made, so that growth costs little."""
        if self._tensors and self._tensors["key"].shape[2] >= blocks * self._rows["key"]:
            return
        grown = {}
        for name, x in like.items():
            old, rows = self._tensors.get(name), self._rows[name]
            with torch.inference_mode(False):  # later steps may be in another mode, and write into it
                room = x.new_zeros(*x.shape[:2], rows * (blocks if old is None else 2 * blocks), x.shape[3])
            if old is not None:
                room[:, :, : old.shape[2]] = old
            grown[name] = room
        self._tensors = grown
