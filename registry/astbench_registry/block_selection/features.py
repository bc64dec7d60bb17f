"""What key blocks are known by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockFeatures(NamedTuple):
    """Features of the key blocks, the keys' side of their scores.

    Nothing but a block's own keys and values, and weights, may enter its rows: those of completed blocks are kept while
    decoding.

    Attributes:
        key: `(batch, kv_heads or 1, rows, d)`: what the groups' queries are multiplied with; one row a block, or the
            same number of consecutive ones for every block.
        mean_value: `(batch, kv_heads, blocks, value_dim)`: mean of the block's values, for variants that need it.
        num_tokens: `(batch or 1, 1, blocks, 1)`: real tokens of the block, likewise.
    """

    key: Tensor
    mean_value: Tensor | None = None
    num_tokens: Tensor | None = None

    def first(self, blocks: int, of: int) -> BlockFeatures:
        """Those of the first blocks, views.

        Args:
            blocks: How many.
            of: How many there are.
        """
        if blocks == of:
            return self

        def some(x: Tensor) -> Tensor:
            return x[:, :, : x.shape[2] // of * blocks]

        value, number = self.mean_value, self.num_tokens
        return BlockFeatures(
            some(self.key), None if value is None else some(value), None if number is None else some(number)
        )
