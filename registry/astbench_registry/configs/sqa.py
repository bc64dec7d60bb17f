"""Options of Sparse Query Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Capabilities


@dataclass(frozen=True)
class SQAConfig(AttentionConfig):
    """Sparse Query Attention: fewer query heads, dense attention by each.

    Args:
        num_query_heads: The paper's H_q: a divisor of the model's heads, and a multiple or a divisor of its
            key/value heads; default the largest such number up to half of the heads.
    """

    num_query_heads: int | None = None

    capabilities: ClassVar = Capabilities(
        patterns=PATTERNS, any_value_size=True, decode=True, shift_invariant=True, yields_probabilities=True
    )
    paper: ClassVar = "Filipek 2025, arXiv 2510.01817"
    complexity: ClassVar = "N M H_q / H"

    def __post_init__(self) -> None:
        self.require(self.num_query_heads is None or self.num_query_heads >= 1, "num_query_heads", "at least 1 head")
