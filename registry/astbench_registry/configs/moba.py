"""Options of MoBA, mixture of block attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.configs.block_selection import TokenTopKConfig


@dataclass(frozen=True)
class MoBAConfig(TokenTopKConfig):
    """MoBA: every token attends to its own block and to the blocks whose mean key agrees best with its query.

    Args:
        block_size: Keys per block, in tokens.
        top_k: Blocks each token keeps, its own included, as the paper counts.
    """

    block_size: int = 512
    top_k: int = 3

    paper: ClassVar = "Lu et al. 2025, arXiv 2502.13189, section 2.2"
