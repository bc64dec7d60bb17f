"""Options of Synthesizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import SELF, AttentionConfig, Capabilities


@dataclass(frozen=True)
class SynthesizerConfig(AttentionConfig):
    """Synthesizer: attention logits that are learned or computed from each token alone, not from pairs.

    Args:
        kind: "dense": a two-layer network maps each token to its row of logits; "random": the logits are a
            learned matrix per head, as many numbers as positions squared; "factorized_dense": two networks map
            each token to short vectors whose products are its row; "factorized_random": two learned matrices of
            width `k`.
        trainable: Of the random kinds; False keeps the logits as drawn (the paper's fixed random).
        k: Width of the two matrices of "factorized_random".
        mix_dense: Mix with ordinary dot-product logits, in learned proportions ("+ Vanilla" in the paper).
        max_length: Longest sequence in tokens; by default the backbone's longest input.
        seed: Of the logits that are not trainable.
    """

    kind: Literal["dense", "random", "factorized_dense", "factorized_random"] = "dense"
    trainable: bool = True
    k: int = 8
    mix_dense: bool = False
    max_length: int | None = None
    seed: int = 0

    capabilities: ClassVar = Capabilities(
        patterns=SELF,
        any_value_size=True,
        decode=True,
        owns_parameters=True,
        needs_hidden_states=True,
        yields_probabilities=True,
    )
    paper: ClassVar = "Tay et al. 2020, arXiv 2005.00743, section 3"
    complexity: ClassVar = "N M"

    def __post_init__(self) -> None:
        kinds = ("dense", "random", "factorized_dense", "factorized_random")
        self.require(self.kind in kinds, "kind", ", ".join(kinds[:-1]) + f" or {kinds[-1]}")
        fixable = self.trainable or self.kind.endswith("random")
        self.require(fixable, "trainable", f"true for kind {self.kind}")
        self.require(self.k >= 1, "k", "at least 1")
        self.require(self.max_length is None or self.max_length >= 1, "max_length", "at least 1 token")

    @property
    def can(self) -> Capabilities:
        """The random kinds read no hidden states; fixed, they own no parameters unless mixed. Positions are counted."""
        return replace(
            self.capabilities,
            owns_parameters=self.trainable or self.mix_dense,
            needs_hidden_states=self.kind.endswith("dense"),
            max_length=self.max_length,
            remedy="raise --attention.max_length",
        )
