"""Options of BigBird's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.capabilities import AttentionConfig, Capabilities, SparseBackend


@dataclass(frozen=True)
class BigBirdConfig(AttentionConfig):
    """BigBird (ITC): blocks of the window, global blocks and random blocks, the same for every input.

    Args:
        block_size: Tokens per block, b in the paper; 64 there, where 512 tokens are dense.
        window_blocks: Blocks seen on each side, beside the query's own: 1 is the paper's window of 3 blocks.
        first_blocks: The first so many blocks of a sequence are global: they see all and are seen by all.
        last_blocks: The last so many blocks that hold a real token are global.
        num_random_blocks: Random blocks r that each query block sees beside all these.
        seed: Another seed, other random blocks.
        backend: Kernel (`astbench doctor` says which can run here).
    """

    block_size: int = 32
    window_blocks: int = 1
    first_blocks: int = 1
    last_blocks: int = 1
    num_random_blocks: int = 3
    seed: int = 0
    backend: SparseBackend = "auto"

    capabilities: ClassVar = Capabilities(
        patterns=("bidirectional_self",),
        any_value_size=True,
        exact_at_full_density=True,
        yields_layout=True,
        yields_probabilities=True,
    )
    paper: ClassVar = "Zaheer et al. 2020, arXiv 2007.14062, section 2 (ITC)"
    complexity: ClassVar = "N (window + global + random) + (N / block_size)^2"
    conformance_options: ClassVar = {"block_size": 4, "num_random_blocks": 2}
    full_density_options: ClassVar = {"window_blocks": 2**20}

    def __post_init__(self) -> None:
        self.require(self.block_size >= 1, "block_size", "at least 1 token")
        for field in ("window_blocks", "first_blocks", "last_blocks", "num_random_blocks"):
            self.require(getattr(self, field) >= 0, field, "0 or more blocks")
