"""A fixed depth: the baseline of every adaptive one."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.depth.configs.static import StaticConfig
from astbench_registry.depth.interface import Choice, DepthPolicy, StackShape


class Static(DepthPolicy):
    """The first `layers` layers, or those of `path`, for every input."""

    config: StaticConfig

    def __init__(self, config: StaticConfig, shape: StackShape) -> None:
        super().__init__(config, shape)
        last = shape.num_layers - 1
        path = config.path if config.path is not None else list(range(config.layers))
        flag = "layers" if config.path is None else "path"
        config.require(path[-1] <= last, flag, f"within the model's {shape.num_layers} layers, 0 to {last}")
        self.path = path

    def choose(self, hidden: Tensor, seen: Tensor) -> Choice:
        """See the base class."""
        paths = torch.zeros(len(hidden), self.shape.num_layers, dtype=torch.bool, device=hidden.device)
        paths[:, self.path] = True
        return Choice(paths)
