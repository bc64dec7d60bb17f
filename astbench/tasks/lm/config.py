"""Options of language modelling. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModelConfig:
    """How a model is evaluated and how it writes; context and stride belong to the data.

    Args:
        incremental: Score each token from the tokens before it alone, one step after the other: with the KV cache, or
            from every prefix anew where the attention cannot decode (slow: take few `--data.windows`). For a strictly
            causal attention the same number as in one pass; for others the honest one.
        max_new_tokens: For `predict`: most tokens to write.
        temperature: For `predict`: of the sampling, seeded by `--seed`; 0 takes the likeliest token each time.
    """

    incremental: bool = False
    max_new_tokens: int = 100
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--task.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--task.temperature must be 0 or more, got {self.temperature}")
