"""Options of Quest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.configs.block_selection import TokenTopKConfig


@dataclass(frozen=True)
class QuestConfig(TokenTopKConfig):
    """Quest: every token attends to the pages whose keys could agree best with its query, by their extremes.

    Args:
        block_size: Keys per page, in tokens.
        top_k: Pages each token keeps, its own included; times `block_size` it is the paper's token budget.
        dense_layers: First so many layers that attend to everything, as in the paper.
    """

    block_size: int = 16
    top_k: int = 64
    dense_layers: int = 2

    paper: ClassVar = "Tang et al. 2024, arXiv 2406.10774, section 3.3"
    # The suite's layer is the second: it would be dense.
    conformance_options: ClassVar = {**TokenTopKConfig.conformance_options, "dense_layers": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.dense_layers >= 0, "dense_layers", "0 or more")
