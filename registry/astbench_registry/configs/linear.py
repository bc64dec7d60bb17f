"""Options of linear attention: none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Capabilities


@dataclass(frozen=True)
class LinearConfig(AttentionConfig):
    """Linear attention: (elu(q) + 1) . (elu(k) + 1) instead of exp(q . k), a state of d x d in decoding."""

    capabilities: ClassVar = Capabilities(patterns=PATTERNS, any_value_size=True, decode=True, shift_invariant=True)
    paper: ClassVar = "Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5 and 7 to 12"
    complexity: ClassVar = "N head_dim"
