"""Options of Quest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from astbench_registry.configs.block_selection import TokenTopKConfig


@dataclass(frozen=True)
class QuestConfig(TokenTopKConfig):
    """Quest: every token attends to the pages whose keys could agree best with its query, by their extremes.

    Args:
        block_size: Keys per page, in tokens.
        top_k: Pages each token keeps, its own included; times `block_size` it is the paper's token budget.
        dense_layers: First so many layers that attend to everything, as in the paper.
        lists: Who sees a block that a token chose under a causal mask. "own": it alone, as in the paper. "carried":
            it and all later tokens of its tile, so that a kernel that computes whole tiles has one list for each.
        query_tile: Consecutive tokens of a tile that carries a list.
    """

    block_size: int = 16
    top_k: int = 64
    dense_layers: int = 2
    lists: Literal["own", "carried"] = "own"  # type: ignore[misc]
    query_tile: int = 64  # type: ignore[misc]

    paper: ClassVar = "Tang et al. 2024, arXiv 2406.10774, section 3.3"
    # The suite's layer is the second: it would be dense.
    conformance_options: ClassVar = {**TokenTopKConfig.conformance_options, "dense_layers": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.dense_layers >= 0, "dense_layers", "0 or more")
