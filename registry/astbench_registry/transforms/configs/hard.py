"""Options of selective hard attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from astbench_registry.transforms.config import TransformConfig


@dataclass(frozen=True)
class HardConfig(TransformConfig):
    """Selective hard attention: in the chosen layers each row keeps its largest weights and nothing else.

    Args:
        top_k: Weights that a row keeps; ties with the last of them stay too.
        weights: What is kept weighs: "renormalised" as a softmax over it alone, "uniform" all the same, "raw" what it
            did before.
    """

    top_k: int = 8
    weights: Literal["renormalised", "uniform", "raw"] = "renormalised"

    paper: ClassVar = "Nagarajan et al. 2020, arXiv 2010.03688"
    conformance_options: ClassVar = {"top_k": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.top_k >= 1, "top_k", "at least 1 key")
        self.require(self.weights in ("renormalised", "uniform", "raw"), "weights", "renormalised, uniform or raw")
