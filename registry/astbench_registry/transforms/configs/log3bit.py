"""Options of pruning and log-scaled quantisation of attention values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from astbench_registry.transforms.config import TransformConfig


@dataclass(frozen=True)
class Log3bitConfig(TransformConfig):
    """Attention values pruned below a threshold and quantised on a log scale to a few bits, without training.

    Args:
        threshold: Attention values below it become zero; 0 prunes none. The paper's choice is 0.001.
        zeros: Share of the visible pairs that become zero, instead of `threshold`: thresholds are found on
            `--backbone.calibrate=N` batches of the training split.
        scope: What has a threshold of its own where `zeros` finds it: the model, each layer, or each head.
        bits: Values left: 2^bits, zero among them; 0 quantises nothing.
    """

    threshold: float = 1e-3
    zeros: float | None = None
    scope: Literal["model", "layer", "head"] = "model"
    bits: int = 3

    paper: ClassVar = "Ji et al. 2021, arXiv 2106.01335"
    conformance_options: ClassVar = {"threshold": 0.01}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.threshold < 1, "threshold", "at least 0 and below 1")
        self.require(self.zeros is None or 0 < self.zeros < 1, "zeros", "between 0 and 1")
        self.require(self.scope in ("model", "layer", "head"), "scope", "model, layer or head")
        self.require(
            self.scope == "model" or self.zeros is not None, "scope", "model without --transform.zeros: one threshold"
        )
        self.require(0 <= self.bits <= 16, "bits", "0 to 16")

    @property
    def calibrated(self) -> bool:
        """See the base class: for thresholds from a share of zeros."""
        return self.zeros is not None

    @property
    def most_values(self) -> int | None:
        """See the base class: 2^bits."""
        return 2**self.bits if self.bits else None
