"""Which key blocks a query group may choose among: what follows from positions alone."""

from __future__ import annotations

from dataclasses import dataclass

from astbench_kernels.layout import ceil_div


@dataclass(frozen=True)
class BlockRule:
    """What each query group may, must and need not see.

    Attributes:
        block_size: Keys per block; the last block may be shorter.
        query_group: Consecutive query positions that share a choice.
        query_length: Number of query rows.
        key_length: Number of key rows.
        query_offset: Absolute position of query row 0, a multiple of `query_group`.
        causal: Blocks that start behind a group's last row are hidden, and of the rest only those compete that end
            before its first row. Needs `local_blocks`, if only 0: causal queries stand among the keys.
        local_blocks: The blocks that a group stands in are always kept, and so many on each side of them; None when
            queries and keys are two sequences.
        sink_block: Block 0 is always kept.
    """

    block_size: int
    query_group: int
    query_length: int
    key_length: int
    query_offset: int = 0
    causal: bool = False
    local_blocks: int | None = None
    sink_block: bool = False

    def __post_init__(self) -> None:
        if self.causal and self.local_blocks is None:
            raise ValueError("a causal rule needs local_blocks of 0 or more, got None: queries stand among the keys")
        if self.query_offset % self.query_group:
            raise ValueError(
                f"query_offset must be a multiple of query_group {self.query_group}, got {self.query_offset}: "
                "the first query of a group speaks for it"
            )

    @property
    def num_blocks(self) -> int:
        """Key blocks, the last perhaps short."""
        return ceil_div(self.key_length, self.block_size)

    @property
    def num_groups(self) -> int:
        """Query groups, the last perhaps short."""
        return ceil_div(self.query_length, self.query_group)

    @property
    def most_visible(self) -> int:
        """Blocks that the last group may see, before padding: no group sees more."""
        if not self.causal:
            return self.num_blocks
        return min(self.num_blocks, ceil_div(self.query_offset + self.query_length, self.block_size))

    @property
    def most_always_kept(self) -> int:
        """No group has more blocks that are always kept."""
        always_kept = int(self.sink_block)
        if self.local_blocks is not None:
            tokens = min(self.query_group, self.query_length) + 2 * self.local_blocks * self.block_size
            # A run of tokens that starts on a block's last one touches the most blocks.
            always_kept += ceil_div(tokens - 1, self.block_size) + 1
        return min(always_kept, self.most_visible)
