"""Options of translation. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from astbench_registry import Pattern

Place = Literal["encoder_self", "decoder_self", "cross"]

PLACES: dict[Place, Pattern] = {
    "encoder_self": "bidirectional_self",
    "decoder_self": "causal_self",
    "cross": "causal_cross",
}
"""Where an encoder-decoder attends, and how."""


@dataclass(frozen=True)
class TranslationConfig:
    """How translations are learned and searched for.

    Args:
        where: Which attention is replaced, of encoder_self, decoder_self and cross, separated by commas; the rest
            runs dense.
        label_smoothing: Share of each target token's probability that is spread over the vocabulary.
        average: Evaluate the mean of the weights at the last this many times, `average_every` steps apart, the
            last of them the end of the training (Vaswani et al. 2017, section 6.1: the last 5 checkpoints).
        average_every: Steps between those times.
        beams: Hypotheses that beam search keeps; 1 is greedy.
        length_penalty: A hypothesis scores log p / length ** this (Wu et al. 2016 divide by
            ((5 + length) / 6) ** alpha instead).
    """

    where: str = "encoder_self,decoder_self,cross"
    label_smoothing: float = 0.1
    average: int = 1
    average_every: int = 100
    beams: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        unknown = [place for place in self.places if place not in PLACES]
        if unknown or len(set(self.places)) < len(self.places):
            raise ValueError(f"--task.where must be some of {','.join(PLACES)}, got {self.where}")
        for name in ("average", "average_every", "beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"--task.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--task.label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")

    @property
    def places(self) -> tuple[Place, ...]:
        """`where`, taken apart."""
        return tuple(cast(Place, place.strip()) for place in self.where.split(","))
