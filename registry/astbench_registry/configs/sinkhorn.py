"""Options of sparse Sinkhorn attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.capabilities import SELF, AttentionConfig, Capabilities


@dataclass(frozen=True)
class SinkhornConfig(AttentionConfig):
    """Sparse Sinkhorn attention: each block sees itself and one block that a learned soft sorting puts beside it.

    Args:
        block_size: Tokens per block.
        num_iterations: Sinkhorn iterations, each one normalises rows and then columns.
        temperature: Divides the sorting scores; lower is closer to a hard permutation.
        seed: Another seed, other Gumbel noise while training.
    """

    block_size: int = 64
    num_iterations: int = 5
    temperature: float = 0.75
    seed: int = 0

    capabilities: ClassVar = Capabilities(
        patterns=SELF, any_value_size=True, decode=True, exact_at_full_density=True, owns_parameters=True
    )
    paper: ClassVar = "Tay et al. 2020, arXiv 2002.11296, section 3"
    complexity: ClassVar = "N block_size + N^2 / block_size"
    conformance_options: ClassVar = {"block_size": 4}
    full_density_options: ClassVar = {"block_size": 2**20}

    def __post_init__(self) -> None:
        self.require(self.block_size >= 1, "block_size", "at least 1 token")
        self.require(self.num_iterations >= 1, "num_iterations", "at least 1")
        self.require(self.temperature > 0, "temperature", "above 0")
