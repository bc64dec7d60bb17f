"""Options of MoBA, mixture of block attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from astbench_registry.configs.block_selection import TokenTopKConfig


@dataclass(frozen=True)
class MoBAConfig(TokenTopKConfig):
    """MoBA: every token attends to its own block and to the blocks whose mean key agrees best with its query.

    Args:
        block_size: Keys per block, in tokens.
        top_k: Blocks each token keeps, its own included, as the paper counts.
        lists: Who sees a block that a token chose under a causal mask. "own": it alone, as in the paper. "carried":
            it and all later tokens of its tile, so that a kernel that computes whole tiles has one list for each.
        query_tile: Consecutive tokens of a tile that carries a list.
    """

    block_size: int = 512
    top_k: int = 3
    lists: Literal["own", "carried"] = "own"  # type: ignore[misc]
    query_tile: int = 64  # type: ignore[misc]

    paper: ClassVar = "Lu et al. 2025, arXiv 2502.13189, section 2.2"
