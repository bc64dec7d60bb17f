"""Options of random paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.depth.config import DepthConfig


@dataclass(frozen=True)
class RandomConfig(DepthConfig):
    """Random layers for every input, the first one always: what a choice has to beat at equal operations.

    Args:
        share: Mean share of the layers; the first layer counts.
        seed: Other seeds, other paths.
    """

    share: float = 0.5
    seed: int = 0

    conformance_options: ClassVar = {"share": 0.6}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.share <= 1, "share", "above 0 and at most 1")
        self.require(0 <= self.seed < 2**32, "seed", f"between 0 and {2**32 - 1}")
