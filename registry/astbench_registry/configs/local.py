"""Options of the sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.capabilities import SELF, AttentionConfig, Capabilities


@dataclass(frozen=True)
class LocalConfig(AttentionConfig):
    """Sliding window: each query sees the keys at most `window` positions away, in linear memory.

    Args:
        window: Keys seen on each side, beside the query's own position (causal: on the left only).
    """

    window: int = 64

    capabilities: ClassVar = Capabilities(
        patterns=SELF,
        any_value_size=True,
        decode=True,
        shift_invariant=True,
        exact_at_full_density=True,
        yields_probabilities=True,
    )
    paper: ClassVar = "Beltagy et al. 2020, arXiv 2004.05150, section 3.1 (window only)"
    complexity: ClassVar = "N window"
    conformance_options: ClassVar = {"window": 5}
    full_density_options: ClassVar = {"window": 2**20}

    def __post_init__(self) -> None:
        self.require(self.window >= 1, "window", "at least 1 key")
