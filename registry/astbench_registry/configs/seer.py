"""Options of SeerAttention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from astbench_registry.capabilities import Capabilities
from astbench_registry.configs.block_selection import BlockSelectionConfig


@dataclass(frozen=True)
class SeerConfig(BlockSelectionConfig):
    """SeerAttention: a gate over blocks, distilled from the layer's own dense attention; trains on a dense model.

    Under a causal mask a `query_group` above 1 is the paper's prefill: all queries of a group are pooled, so later
    rows choose for earlier ones.

    Args:
        block_size: Keys per block, in tokens.
        threshold: Keep the blocks whose gate is at least this, instead of `density` or `top_k`; `min_blocks` remains.
        gate_dim: Width of the gate's queries and keys; default: the head's.
        distill_weight: Weight of the distillation loss, the only one that reaches the gate.
    """

    block_size: int = 64
    min_blocks: int = 1
    sink_block: bool = False
    threshold: float | None = None
    gate_dim: int | None = None
    distill_weight: float = 1.0

    capabilities: ClassVar = replace(BlockSelectionConfig.capabilities, owns_parameters=True)
    paper: ClassVar = "Gao et al. 2024, arXiv 2410.13276, sections 3.1 and 3.2"
    complexity: ClassVar = "N M density + (N / query_group) (M / block_size)"
    full_density_options: ClassVar = {**BlockSelectionConfig.full_density_options, "threshold": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.threshold is None or 0 < self.threshold < 1, "threshold", "between 0 and 1")
        self.require(self.gate_dim is None or self.gate_dim >= 1, "gate_dim", "at least 1")
        self.require(self.distill_weight > 0, "distill_weight", "above 0: nothing else teaches the gate")

    @property
    def can(self) -> Capabilities:
        """Pooling a group's queries looks ahead; one query a group looks at nothing but itself."""
        return replace(super().can, strictly_causal=self.query_group in (None, 1))
