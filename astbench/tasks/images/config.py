"""Options of classifying pictures. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageClassifierConfig:
    """How the classes of pictures are learned.

    Args:
        label_smoothing: Share of the target that all classes get alike in training; CCT's recipe takes 0.1.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--task.label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
