"""Options of Longformer's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import SELF, AttentionConfig, Capabilities


@dataclass(frozen=True)
class LongformerConfig(AttentionConfig):
    """Longformer: a sliding window, dilated if wanted, and a few global tokens that see all and are seen by all.

    Args:
        window: Keys seen on each side, beside the query's own position (causal: on the left only). The paper
            counts both sides together: its 512 is 256 here.
        dilation: Steps between the keys of a window: 1 for neighbours, 2 for every other token.
        dilated_heads: How many heads, the first ones, are dilated; all by default (the paper: 2).
        num_global: The first so many real tokens of each sequence are global, beside those that the task names.
        global_projections: Global rows get query, key and value projections of their own, copied from the
            backbone's at the start; for backbones without rotary positions.
        backend: "transformers" multiplies windows by its LongformerSelfAttention: not causal, no dilation, as
            many key as query heads.
    """

    window: int = 64
    dilation: int = 1
    dilated_heads: int | None = None
    num_global: int = 1
    global_projections: bool = False
    backend: Literal["auto", "transformers"] = "auto"

    capabilities: ClassVar = Capabilities(
        patterns=SELF,
        any_value_size=True,
        decode=True,
        shift_invariant=True,
        exact_at_full_density=True,
        yields_probabilities=True,
    )
    paper: ClassVar = "Beltagy et al. 2020, arXiv 2004.05150, section 3.1"
    complexity: ClassVar = "N (window + globals)"
    conformance_options: ClassVar = {"window": 5, "num_global": 2}
    full_density_options: ClassVar = {"window": 2**20, "dilation": 1}

    def __post_init__(self) -> None:
        self.require(self.window >= 1, "window", "at least 1 key")
        self.require(self.dilation >= 1, "dilation", "at least 1 token")
        self.require(self.dilated_heads is None or self.dilated_heads >= 1, "dilated_heads", "at least 1 head")
        self.require(self.num_global >= 0, "num_global", "0 or more tokens")
        # Without any, three projections would wait for a task that names global tokens.
        needed = self.num_global >= 1 or not self.global_projections
        self.require(needed, "num_global", "at least 1 token with --attention.global_projections=true")

        if self.backend == "transformers":
            self.require(self.dilation == 1, "dilation", "1 with --attention.backend=transformers")
            self.require(self.window >= 2, "window", "at least 2 keys with --attention.backend=transformers")

    @property
    def can(self) -> Capabilities:
        """Projections of its own need every token's layer input, which a cache of keys and values does not hold."""
        can = self.capabilities
        if self.backend == "transformers":
            can = replace(can, patterns=("bidirectional_self",), gqa=False, decode=False)
        if not self.global_projections:
            return can
        return replace(
            can,
            any_value_size=False,
            gqa=False,
            decode=False,
            exact_at_full_density=False,
            yields_probabilities=False,
            owns_parameters=True,
            needs_hidden_states=True,
        )
