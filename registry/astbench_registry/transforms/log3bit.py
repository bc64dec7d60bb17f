"""Pruned and log-quantised attention (Ji et al. 2021, arXiv 2106.01335), at inference alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from astbench_registry.interface import AttentionShape
from astbench_registry.transforms.configs.log3bit import Log3bitConfig
from astbench_registry.transforms.interface import Transform
from astbench_registry.transforms.values import ValueCounts

LEAST = 1e-10
"""Where the scale begins without a threshold, as in the authors' code."""


class Log3bit(Transform):
    """Attention values a below a threshold t become 0, the others one of K = 2^bits - 1 values.

        s = -log2(t) / K                                    width of a bin
        i = min(floor((log2(a) - log2(t)) / s), K - 1)      its number
        q(a) = t 2^(s (i + 1/2)) for a >= t, else 0         its middle on the log scale

    so that there are 2^bits values, zero among them. With `bits=0` what is not pruned stays as it is; rows are not
    normalised anew in either case. With `threshold=0` there is no pruning of its own: the scale begins at 1e-10, is cut
    into 2^bits bins, and what falls into the lowest becomes 0.

    The paper's abstract says pruning, "log-scaled mapping" and 2^3 unique values. What that is in numbers is taken from
    the authors' code (StonyBrookNLP/spiqa, its method "uniform quantization, log scale, w/ pruning, mid-point of the
    bin edges", and "w/o pruning"), with t = 0.001 for all layers and heads.

    Left open there, and decided here:

    * Their pruning alone keeps a > t, their quantisation a >= t; here a >= t in both.
    * Their code without pruning lets a = 1 fall into a bin above 1; here it is in the highest bin below.
    * They raise one threshold by hand and look at the share of zeros. `zeros` finds it from a share, on attention that
      is not pruned yet: pruning early layers changes what later ones see, so the share that comes out is measured
      and differs. A threshold is an edge of bins 2.3% wide.
    * Thresholds for each layer or head (`scope`) are not in their code, which knows one, and a list of heads to which
      it applies.
    """

    config: Log3bitConfig

    def __init__(self, config: Log3bitConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.thresholds: Tensor | None = None  # float64 (heads or 1,)
        if not config.calibrated:
            self.thresholds = torch.tensor([config.threshold], dtype=torch.float64)

    def start(self, own: ValueCounts, everywhere: ValueCounts) -> None:
        """See the base class: the thresholds that make the share of zeros."""
        assert self.config.zeros is not None
        counts = {"model": everywhere, "layer": own.together(), "head": own}[self.config.scope]
        self.thresholds = counts.threshold_for(self.config.zeros)

    def __call__(self, weights: Tensor, visible: Tensor) -> Tensor:
        """See the base class.

        Raises:
            ValueError: `zeros` is set and no thresholds were found yet.
        """
        if self.thresholds is None:
            raise ValueError("--transform.zeros needs thresholds: set --backbone.calibrate to 1 batch or more")
        threshold = self.thresholds.to(weights.device)[:, None, None]  # (heads or 1, 1, 1), float64
        if not self.config.bits:
            return weights.masked_fill(weights < threshold.to(weights.dtype), 0.0)
        levels = 2**self.config.bits - 1
        # Without a threshold the lowest of 2^bits bins from LEAST on is pruned: the scale begins where it ends.
        threshold = torch.where(threshold > 0, threshold, LEAST ** (levels / (levels + 1)))
        low = threshold.log2()
        step = -low / levels
        low, step, threshold = (x.to(weights.dtype) for x in (low, step, threshold))
        number = weights.log2().sub_(low).div_(step).floor_().clamp_(0, levels - 1)
        return number.add_(0.5).mul_(step).add_(low).exp2_().masked_fill_(weights < threshold, 0.0)

    def facts(self) -> dict[str, object]:
        """See the base class."""
        if not self.config.calibrated or self.thresholds is None:
            return {}
        return {"thresholds": [float(f"{t:.6g}") for t in self.thresholds.tolist()]}

    @staticmethod
    def levels(threshold: float, bits: int) -> list[float]:
        """All values above zero that weights can have, the smallest first."""
        count = 2**bits - 1
        low = math.log2(threshold) if threshold else math.log2(LEAST) * count / (count + 1)
        return [2 ** (low - low / count * (i + 0.5)) for i in range(count)]
