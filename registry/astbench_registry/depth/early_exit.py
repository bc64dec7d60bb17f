"""Early exit by hidden-state saturation (Schuster et al. 2022, arXiv 2207.07061)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from astbench_registry.depth.configs.early_exit import EarlyExitConfig
from astbench_registry.depth.interface import Choice, DepthPolicy, StackShape, seen_mean


class EarlyExit(DepthPolicy):
    """An input stops after layer i once cos(h_i, h_{i+1}) >= threshold, the cosine's mean over its tokens.

    The paper has three measures of confidence. This is the one that needs no output layer, so that it works under any
    head. There each token exits by itself while a text is generated; here a whole input does.
    """

    config: EarlyExitConfig

    def __init__(self, config: EarlyExitConfig, shape: StackShape) -> None:
        super().__init__(config, shape)
        config.require(config.least <= shape.num_layers, "least", f"at most the model's {shape.num_layers} layers")

    def choose(self, hidden: Tensor, seen: Tensor) -> Choice:
        """See the base class: all layers, until :meth:`stops` says otherwise."""
        return Choice(torch.ones(len(hidden), self.shape.num_layers, dtype=torch.bool, device=hidden.device))

    def stops(self, layer: int, before: Tensor, after: Tensor, seen: Tensor) -> Tensor | None:
        """See the base class."""
        if layer + 1 < self.config.least:
            return None
        cosine = cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)
        return seen_mean(cosine[..., None], seen).squeeze(-1) >= self.config.threshold
