"""Summaries of key blocks that outlive a call: what a decoding step need not compute again."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockSummaries:
    """What a variant found out about the blocks of a KV cache, for later calls on the same cache.

    A new one knows nothing; every call that is given it adds to it. It belongs to one layer and one cache: whoever
    changes the cache otherwise than by appending to it, or cutting off its end, starts a new one.

    Attributes:
        blocks: Number of blocks, from the first key on, that it knows.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._tensors: tuple[Tensor, ...] = ()
        self._rows: tuple[int, ...] = ()
        self._valid: Tensor | None = None

    def trim(self, key_valid: Tensor | None, limit: int, size: int) -> int:
        """Forget blocks behind the first `limit`, and all where padding has changed; returns how many it knows then.

        Args:
            key_valid: Bool `(batch, key_length)`, the padding of this call; None for none.
            limit: Blocks that can be known.
            size: Keys per block.
        """
        self.blocks = min(self.blocks, limit)
        if self.blocks and self._padding_differs(key_valid, self.blocks * size):
            self.blocks = 0
        return self.blocks

    def add(self, new: tuple[Tensor, ...], count: int, key_valid: Tensor | None, size: int) -> None:
        """Add `count` blocks, as :meth:`BlockSelectingAttention.summarise` returns them, behind those that it knows."""
        known, stop = self.blocks, self.blocks + count
        self._rows = tuple(x.shape[2] // count for x in new)
        if not known:
            self._tensors = ()
        self._reserve(stop, new)
        for kept, x, each in zip(self._tensors, new, self._rows, strict=True):
            kept[:, :, known * each : stop * each] = x
        self.blocks = stop
        self._valid = None if key_valid is None else key_valid[:, : stop * size].clone()

    def of(self, blocks: int) -> tuple[Tensor, ...]:
        """Summaries of the first `blocks` blocks, finite but meaningless for those that it does not know."""
        self._reserve(blocks, self._tensors)
        return tuple(x[:, :, : blocks * each] for x, each in zip(self._tensors, self._rows, strict=True))

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

    def _padding_differs(self, key_valid: Tensor | None, length: int) -> bool:
        if self._valid is None or key_valid is None:
            return not (self._valid is None and key_valid is None)
        return not torch.equal(self._valid[:, :length], key_valid[:, :length])
