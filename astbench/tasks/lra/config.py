"""Options of sequence classification. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SequenceClassifierConfig:
    """How a class is read off the encoder's output.

    Args:
        pooling: "mean" over the input's tokens, or the output at a token put before it ("cls"), which makes inputs
            one token longer.
    """

    pooling: Literal["mean", "cls"] = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"--task.pooling must be mean or cls, got {self.pooling}")
