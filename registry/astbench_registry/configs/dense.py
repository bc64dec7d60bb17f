"""Options of dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Capabilities


@dataclass(frozen=True)
class DenseConfig(AttentionConfig):
    """Softmax attention over everything visible, by torch's scaled_dot_product_attention."""

    capabilities: ClassVar = Capabilities(patterns=PATTERNS, decode=True, exact_at_full_density=True)
    paper: ClassVar = "Vaswani et al. 2017, arXiv 1706.03762"
    complexity: ClassVar = "N M"
