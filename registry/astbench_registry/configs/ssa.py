"""Options of Selective Self-Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.capabilities import SELF, AttentionConfig, Capabilities


@dataclass(frozen=True)
class SSAConfig(AttentionConfig):
    """Selective Self-Attention: dense attention whose sharpness is learned per token and per context length.

    Args:
        token: Scale each query by what it says (the paper's token-aware temperature).
        position: Scale each query by how many keys it sees (the paper's position-aware temperature).
        value: Scale each value by what it says.
    """

    token: bool = True
    position: bool = True
    value: bool = True

    capabilities: ClassVar = Capabilities(
        patterns=SELF, decode=True, shift_invariant=True, owns_parameters=True, yields_probabilities=True
    )
    paper: ClassVar = "Zhang et al. 2024, arXiv 2411.12892, section 3"
    complexity: ClassVar = "N M"

    def __post_init__(self) -> None:
        self.require(self.token or self.position or self.value, "token", "true, unless position or value is")
