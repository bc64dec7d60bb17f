"""Options of the Performer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Capabilities


@dataclass(frozen=True)
class PerformerConfig(AttentionConfig):
    """Performer (FAVOR+): softmax weights estimated with positive orthogonal random features, in linear memory.

    Args:
        num_features: Random features m; the error falls with 1/sqrt(m).
        kernel: "softmax" estimates exp(q . k); "relu" is the paper's generalised attention, no estimate of it.
        orthogonal: Draw features orthogonal to one another within blocks of head_dim, which lowers the variance.
        kernel_epsilon: Added to every feature of the relu kernel, so that no row of weights is zero.
        redraw_interval: Training steps after which new features are drawn; 0 for never.
        seed: Of the features, together with layer and redraw.
        backend: "auto" is this package's own code; "performer_pytorch" runs the package of that name,
            whose softmax features have gradients off by some percent (it detaches maxima that do not cancel).
    """

    num_features: int = 256
    kernel: Literal["softmax", "relu"] = "softmax"
    orthogonal: bool = True
    kernel_epsilon: float = 1e-3
    redraw_interval: int = 1000
    seed: int = 0
    backend: Literal["auto", "performer_pytorch"] = "auto"

    capabilities: ClassVar = Capabilities(patterns=PATTERNS, any_value_size=True, decode=True, shift_invariant=True)
    paper: ClassVar = "Choromanski et al. 2021, arXiv 2009.14794, eq. 5 and lemma 1 (FAVOR+)"
    complexity: ClassVar = "N num_features"
    conformance_options: ClassVar = {"num_features": 13}

    def __post_init__(self) -> None:
        self.require(self.num_features >= 1, "num_features", "at least 1")
        self.require(self.kernel in ("softmax", "relu"), "kernel", "softmax or relu")
        self.require(self.kernel_epsilon >= 0, "kernel_epsilon", "at least 0")
        self.require(self.redraw_interval >= 0, "redraw_interval", "at least 0 steps")
        self.require(self.backend in ("auto", "performer_pytorch"), "backend", "auto or performer_pytorch")
        if self.backend == "performer_pytorch":
            self.require(self.kernel_epsilon == 1e-3, "kernel_epsilon", "0.001 with backend performer_pytorch")

    @property
    def can(self) -> Capabilities:
        """The package's own limits: it knows no padding mask, and stabilises keys by a maximum over later ones."""
        if self.backend == "auto":
            return self.capabilities
        return replace(
            self.capabilities,
            gqa=False,
            padding=False,
            decode=False,
            strictly_causal=self.kernel == "relu",
            dtypes=("float64", "float32"),
            remedy="set --attention.backend=auto",
        )
