"""Options of native sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import SELF
from astbench_registry.configs.block_selection import TokenTopKConfig


@dataclass(frozen=True)
class NSAConfig(TokenTopKConfig):
    """Native sparse attention: compressed tokens, blocks chosen by them, and a window, each with a gate.

    Args:
        block_size: Keys per selected block, in tokens (the paper's l').
        top_k: Blocks each token selects, among them always the first and its own and the one before (the paper's n).
        compress_size: Tokens that a compressed token stands for (the paper's l).
        compress_stride: Tokens from the start of one to the start of the next (the paper's d).
        window: Keys of the sliding window, the token's own included (causal; on each side without a mask).
        lists: Who sees a block that a token selected under a causal mask. "own": it alone, as in the paper. "carried":
            it and all later tokens of its tile, so that a kernel that computes whole tiles has one list for each.
        query_tile: Consecutive tokens of a tile that carries a list.
    """

    block_size: int = 64
    top_k: int = 16
    compress_size: int = 32
    compress_stride: int = 16
    window: int = 512
    lists: Literal["own", "carried"] = "own"  # type: ignore[misc]
    query_tile: int = 64  # type: ignore[misc]

    local_blocks: ClassVar[int] = 1  # type: ignore[misc]
    sink_block: ClassVar[bool] = True  # type: ignore[misc]

    capabilities: ClassVar = replace(
        TokenTopKConfig.capabilities,
        any_value_size=False,
        patterns=SELF,
        joint_choice=True,
        exact_at_full_density=False,
        yields_probabilities=False,
        owns_parameters=True,
        needs_hidden_states=True,
    )
    paper: ClassVar = "Yuan et al. 2025, arXiv 2502.11089, section 3.3"
    complexity: ClassVar = "N (top_k block_size + window) + N M / compress_stride"
    conformance_options: ClassVar = {
        "block_size": 8,
        "top_k": 5,
        "compress_size": 6,
        "compress_stride": 2,
        "window": 7,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.compress_stride >= 1, "compress_stride", "at least 1 token")
        for field in ("compress_size", "block_size"):
            whole = getattr(self, field) % self.compress_stride == 0 and getattr(self, field) > 0
            self.require(whole, field, f"a multiple of compress_stride ({self.compress_stride})")
        self.require(self.window >= 2, "window", "at least 2 keys")
