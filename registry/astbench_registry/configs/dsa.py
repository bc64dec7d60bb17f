"""Options of DeepSeek sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from astbench_registry.capabilities import SELF
from astbench_registry.configs.block_selection import TokenTopKConfig


@dataclass(frozen=True)
class DSAConfig(TokenTopKConfig):
    """DeepSeek sparse attention: single tokens by a small indexer, distilled from the layer's own dense attention.

    Args:
        top_k: Tokens each token attends to, all heads to the same.
        index_heads: Heads of the indexer; DeepSeek-V3.2-Exp has 64.
        index_dim: Their width; there 128.
        distill_weight: Weight of the distillation loss, the only one that reaches the indexer.
    """

    top_k: int = 2048
    index_heads: int = 4
    index_dim: int = 32
    distill_weight: float = 1.0

    block_size: ClassVar[int] = 1  # type: ignore[misc]

    capabilities: ClassVar = replace(
        TokenTopKConfig.capabilities,
        patterns=SELF,
        decode=False,
        owns_parameters=True,
        needs_hidden_states=True,
        yields_probabilities=False,
    )
    paper: ClassVar = "DeepSeek-AI 2025, DeepSeek-V3.2-Exp, section 1"
    complexity: ClassVar = "N top_k + N M index_heads index_dim / (num_heads head_dim)"
    conformance_options: ClassVar = {"top_k": 9, "index_heads": 2, "index_dim": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.index_heads >= 1, "index_heads", "at least 1")
        self.require(self.index_dim >= 1, "index_dim", "at least 1")
        self.require(self.distill_weight > 0, "distill_weight", "above 0: nothing else teaches the indexer")
