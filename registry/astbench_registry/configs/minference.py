"""Options of MInference's vertical-slash pattern."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import Capabilities
from astbench_registry.configs.block_selection import BlockSelectionConfig


@dataclass(frozen=True)
class MInferenceConfig(BlockSelectionConfig):
    """MInference, vertical-slash: columns and diagonals that the last queries of the prompt attend to most.

    Args:
        block_size: Keys per block, in tokens: a column or a diagonal takes the blocks that it runs through.
        query_group: Query rows per block row.
        vertical: Columns (single keys) kept per head, the `first` ones included.
        slash: Diagonals (distances from query to key) kept per head, the `recent` ones included.
        last_queries: Queries at the end of the prompt whose attention decides.
        first: Columns at the start of the sequence that are always kept.
        recent: Shortest distances that are always kept.
    """

    block_size: int = 64
    query_group: int = 64
    vertical: int = 1000
    slash: int = 6096
    last_queries: int = 64
    first: int = 30
    recent: int = 100

    lists: ClassVar[Literal["own", "carried"]] = "own"  # type: ignore[misc]
    query_tile: ClassVar[int] = 64  # type: ignore[misc]
    density: ClassVar[float] = 1.0  # type: ignore[misc]
    top_k: ClassVar[int | None] = None  # type: ignore[misc]
    min_blocks: ClassVar[int] = 1  # type: ignore[misc]
    local_blocks: ClassVar[int] = 0  # type: ignore[misc]
    sink_block: ClassVar[bool] = False  # type: ignore[misc]

    capabilities: ClassVar = replace(
        BlockSelectionConfig.capabilities, patterns=("causal_self",), decode=False, strictly_causal=False
    )
    paper: ClassVar = "Jiang et al. 2024, arXiv 2407.02490, section 3.2"
    complexity: ClassVar = "N (vertical + slash) block_size + M last_queries"
    conformance_options: ClassVar = {
        "block_size": 4,
        "query_group": 4,
        "vertical": 2,
        "slash": 5,
        "last_queries": 9,
        "first": 1,
        "recent": 2,
    }
    full_density_options: ClassVar = {"vertical": 2**20}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.query_group >= 1, "query_group", "at least 1 token")
        self.require(self.vertical >= 1, "vertical", "at least 1 column")
        self.require(self.slash >= 1, "slash", "at least 1 diagonal")
        self.require(self.last_queries >= 1, "last_queries", "at least 1 query")
        self.require(self.first >= 0, "first", "0 or more columns")
        self.require(self.recent >= 1, "recent", "at least 1 distance: a token sees itself")

    @property
    def can(self) -> Capabilities:
        """The class's own: whatever the group, the prompt's end chooses for its start."""
        return self.capabilities
