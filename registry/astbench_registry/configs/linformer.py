"""Options of Linformer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import AttentionConfig, Capabilities


@dataclass(frozen=True)
class LinformerConfig(AttentionConfig):
    """Linformer: keys and values are mixed along the length into `k` rows by learned matrices E and F.

    Args:
        k: Rows that keys and values are projected to.
        sharing: "none": E and F for each key/value head; "headwise": one E and one F for all heads;
            "key_value": one matrix for both and for all heads.
        max_length: Longest sequence of keys in tokens (rows of E and F); by default the backbone's longest input.
    """

    k: int = 256
    sharing: Literal["none", "headwise", "key_value"] = "headwise"
    max_length: int | None = None

    capabilities: ClassVar = Capabilities(
        patterns=("bidirectional_self", "bidirectional_cross", "causal_cross"),
        any_value_size=True,
        decode=True,
        owns_parameters=True,
    )
    paper: ClassVar = "Wang et al. 2020, arXiv 2006.04768, eq. 7"
    complexity: ClassVar = "(N + M) k"
    conformance_options: ClassVar = {"k": 11}

    def __post_init__(self) -> None:
        self.require(self.k >= 1, "k", "at least 1 row")
        sharings = ("none", "headwise", "key_value")
        self.require(self.sharing in sharings, "sharing", "none, headwise or key_value")
        self.require(self.max_length is None or self.max_length >= 1, "max_length", "at least 1 token")

    @property
    def can(self) -> Capabilities:
        """As long as the matrices have rows."""
        return replace(self.capabilities, max_length=self.max_length, remedy="raise --attention.max_length")
