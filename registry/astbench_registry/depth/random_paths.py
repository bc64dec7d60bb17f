"""Random paths: what a learned choice has to beat at equal operations."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from astbench_registry.depth.configs.random_paths import RandomConfig
from astbench_registry.depth.interface import Choice, DepthPolicy


class RandomPaths(DepthPolicy):
    """The first layer, and of the others as many as make the mean share, drawn for each input by itself.

    A share that is no whole number of layers is met in the mean: some inputs get one layer more. Which layers depends
    on the seed and on what the input's embedding holds, so the same input gets the same path wherever it stands. While
    training they are drawn anew each time.
    """

    config: RandomConfig

    def choose(self, hidden: Tensor, seen: Tensor) -> Choice:
        """See the base class. Cost: reads the embeddings once, on the CPU."""
        layers = self.shape.num_layers
        wanted = max(0.0, self.config.share * layers - 1)  # beside the first layer
        paths = torch.zeros(len(hidden), layers, dtype=torch.bool)
        paths[:, 0] = True
        for row, path in enumerate(paths):
            draw = None if self.training else self._generator(hidden[row][seen[row]])
            number = int(wanted) + int(torch.rand((), generator=draw) < wanted - int(wanted))
            path[1 + torch.randperm(layers - 1, generator=draw)[:number]] = True
        return Choice(paths.to(hidden.device))

    def _generator(self, tokens: Tensor) -> torch.Generator:
        content = tokens.detach().float().cpu().contiguous().numpy().tobytes()
        digest = hashlib.blake2b(content, digest_size=8, key=self.config.seed.to_bytes(4, "big")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
