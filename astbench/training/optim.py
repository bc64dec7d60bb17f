"""Options shared by every task. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, in optimizer steps of `--trainer.max_steps`.

    Args:
        lr: Peak learning rate.
        attention_lr: Peak learning rate of the attention's own parameters; default: `lr`.
        weight_decay: On matrices; biases, norms and embeddings' norms go without.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        warmup_steps: Steps of linear warm-up.
        schedule: What follows the warm-up, down to 0 at `max_steps` (constant: it stays).
        train: Which parameters learn: everything, or on a frozen backbone only the attention's own, or only those of
            the depth policy.
    """

    lr: float = 1e-3
    attention_lr: float | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 50
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    train: Literal["all", "attention", "depth"] = "all"

    def __post_init__(self) -> None:
        for name in ("lr", "attention_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--optim.{name} must be above 0, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--optim.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--optim.weight_decay must be 0 or more, got {self.weight_decay}")
        if self.warmup_steps < 0:
            raise ValueError(f"--optim.warmup_steps must be 0 or more, got {self.warmup_steps}")
