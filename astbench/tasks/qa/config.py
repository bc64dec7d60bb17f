"""Options of span extraction. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpanQAConfig:
    """How answers are read off the start and end scores.

    Args:
        max_answer_tokens: Longest answer.
    """

    max_answer_tokens: int = 30

    def __post_init__(self) -> None:
        if self.max_answer_tokens < 1:
            raise ValueError(f"--task.max_answer_tokens must be at least 1, got {self.max_answer_tokens}")
