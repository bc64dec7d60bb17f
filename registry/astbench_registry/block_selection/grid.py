"""The groups that choose, the blocks they choose among, and what may and must be kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from astbench_kernels import BlockLayout
from astbench_registry.block_selection.call import Call


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

    def layout(self, keep: Tensor, call: Call) -> BlockLayout:
        """Lists of the blocks to keep, bool `(batch, list_heads, groups, blocks)`, for a call's queries and keys."""
        return BlockLayout.from_mask(
            keep,
            block_size=self.block_size,
            query_group=self.query_group,
            query_length=call.q.shape[2],
            key_length=call.k.shape[2],
            query_offset=call.mask.query_offset,
        )


@dataclass(frozen=True)
class Selection(Grid):
    """Who may choose what.

    Attributes:
        visible: Bool `(batch or 1, 1, groups, blocks)`: holds a key that some row of the group may see.
        always_kept: Bool, as `visible`: kept whatever their score.
        candidates: Bool, as `visible`: may be kept.
    """

    visible: Tensor
    always_kept: Tensor
    candidates: Tensor

    @property
    def free(self) -> Tensor:
        """Candidates that are not kept anyway: where there is a choice."""
        return self.candidates & ~self.always_kept

    def of_groups(self, groups: Tensor) -> Selection:
        """The same for some groups alone; bool `(groups,)`."""
        parts = {name: getattr(self, name)[:, :, groups] for name in ("visible", "always_kept", "candidates")}
        first = self.first[groups]
        return replace(self, num_groups=len(first), first=first, **parts)
