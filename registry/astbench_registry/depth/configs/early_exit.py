"""Options of early exit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.depth.config import DepthConfig


@dataclass(frozen=True)
class EarlyExitConfig(DepthConfig):
    """Layer after layer until one changes little: the rest is left out.

    Args:
        threshold: An input stops after a layer whose output has this cosine with its input, or more.
        least: Layers that every input goes through.
    """

    threshold: float = 0.95
    least: int = 1

    paper: ClassVar = "Schuster et al. 2022, arXiv 2207.07061 (hidden-state saturation)"
    conformance_options: ClassVar = {"threshold": 0.9}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(-1 <= self.threshold <= 1, "threshold", "between -1 and 1")
        self.require(self.least >= 1, "least", "at least 1 layer: a path of no layers is no model")
