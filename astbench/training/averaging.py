"""The mean of a run's last weights, in its checkpoint, so that a resumed run ends with the same mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEY = "average"
"""Where a checkpoint holds it."""


class WeightAverage:
    """Mean of the weights at the last `count` times `every` steps apart, the last of them the end of the training.

    Vaswani et al. 2017 (arXiv 1706.03762, section 6.1) average the last checkpoints they had written. Here the
    mean is kept up while training: one copy of the weights instead of `count` files.

    Args:
        count: How many.
        every: Steps between them.
        last: The step that ends the training.
    """

    def __init__(self, count: int, every: int, last: int) -> None:
        self.steps = [last - every * i for i in reversed(range(count))]
        self.taken = 0
        self.weights: dict[str, Tensor] = {}

    @property
    def complete(self) -> bool:
        """All are in."""
        return self.taken == len(self.steps)

    @torch.no_grad()
    def after_step(self, step: int, model: nn.Module) -> None:
        """Take the weights in when `step` is one of the steps, once."""
        if self.complete or step != self.steps[self.taken]:
            return
        self.taken += 1
        for name, weight in model.state_dict().items():
            fresh = weight.to("cpu", copy=True)
            if self.taken == 1 or not fresh.is_floating_point():
                self.weights[name] = fresh
            else:
                self.weights[name] += (fresh - self.weights[name]) / self.taken

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"taken": self.taken, "steps": self.steps, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.taken, self.steps, self.weights = state["taken"], list(state["steps"]), dict(state["weights"])


def final_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a run is evaluated with: its mean where there is a whole one, else its last weights."""
    average = checkpoint.get(KEY)
    if average is not None and average["taken"] == len(average["steps"]):
        return dict(average["weights"])
    return dict(checkpoint["state_dict"])
