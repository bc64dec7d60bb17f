"""A depth policy at work in a swapped model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from astbench.backbones.depth.folding import Folding
from astbench.backbones.depth.stack import find_stack
from astbench.backbones.swap import SwapHandle
from astbench_registry.depth.interface import Outcome
from astbench_registry.depth.registry import build_depth, make_depth_config

DEPTH = "astbench_depth"
"""Name of the policy as a part of the Hugging Face model, so that it is saved and loaded with it."""


class AdaptiveDepth:
    """Puts a policy on a model whose attention is swapped; its parameters become the model's.

    >>> depth = AdaptiveDepth(handle, "static", {"layers": 2})  # doctest: +SKIP

    Args:
        handle: Of the swapped model.
        name: Registered policy.
        options: Its options as plain data.

    Raises:
        ValueError: an option or a value that does not exist, or does not go with the model.
        CapabilityError: a model without one stack of layers.
    """

    def __init__(self, handle: SwapHandle, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.config = name, make_depth_config(name, options)
        self.stack = find_stack(handle)
        self.policy = build_depth(name, self.config, self.stack.shape).to(handle.model.device)
        self.policy.train(handle.model.training)
        self._model = handle.model
        self._model.add_module(DEPTH, self.policy)
        self.folding = Folding(self.stack, self.policy)

    @contextmanager
    def full_depth(self) -> Iterator[None]:
        """Inside, every layer runs and the policy is not asked."""
        self.folding.full = True
        try:
            yield
        finally:
            self.folding.full = False

    def losses(self, each: Tensor) -> dict[str, Tensor]:
        """What the policy learns from the last pass, by name; call it once a training step.

        Args:
            each: `(batch,)`: the task's loss of each input of that pass.
        """
        last, self.folding.last = self.folding.last, None
        if last is None:
            return {}
        if len(each) != len(last.ran):
            raise ValueError(f"depth '{self.name}' ran {len(last.ran)} inputs, and {len(each)} losses came of them")
        outcome = Outcome(each.detach(), self.policy.spent(last.ran), last.distance)
        return self.policy.losses(last.choice, outcome)

    def own_parameters(self) -> list[torch.nn.Parameter]:
        """The policy's."""
        return list(self.policy.parameters())

    def undo(self) -> None:
        """Give the model its plain depth back."""
        self.folding.undo()
        delattr(self._model, DEPTH)
