"""The groups that choose, the blocks they choose among, and what may and must be kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from astbench_kernels import BlockLayout
from astbench_registry.mask import AttentionMask


@dataclass(frozen=True)
class Grid:
    """The groups that choose and the blocks they choose among, in one call.

    Attributes:
        block_size: Keys per block.
        query_group: Queries per group.
        num_blocks: Key blocks.
        num_groups: Query groups.
        first: int64 `(groups,)`: position of each group's first query.
    """

    block_size: int
    query_group: int
    num_blocks: int
    num_groups: int
    first: Tensor

    def layout(self, keep: Tensor, q: Tensor, k: Tensor, mask: AttentionMask) -> BlockLayout:
        """Lists of the blocks to keep, bool `(batch, list_heads, groups, blocks)`, for these queries and keys."""
        return BlockLayout.from_mask(
            keep,
            block_size=self.block_size,
            query_group=self.query_group,
            query_length=q.shape[2],
            key_length=k.shape[2],
            query_offset=mask.query_offset,
        )


@dataclass(frozen=True)
class Selection(Grid):
    """Who may choose what.

    Attributes:
        visible: Bool `(batch or 1, 1, groups, blocks)`: holds a key that some row of the group may see.
        forced: Bool, as `visible`: always kept.
        candidates: Bool, as `visible`: may be kept.
    """

    visible: Tensor
    forced: Tensor
    candidates: Tensor

    @property
    def free(self) -> Tensor:
        """Candidates that are not forced: where there is a choice."""
        return self.candidates & ~self.forced
