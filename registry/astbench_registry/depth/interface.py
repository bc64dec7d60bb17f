"""The one interface of every depth policy: what an input looks like in, the layers that it goes through out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from astbench_registry.depth.config import DepthConfig


@dataclass(frozen=True)
class StackShape:
    """The layers that a policy chooses among.

    Attributes:
        num_layers: How many.
        hidden_size: Width of what goes through them.
        costs: Each layer's share of the stack's operations; they sum to 1.
    """

    num_layers: int
    hidden_size: int
    costs: tuple[float, ...]

    @staticmethod
    def of_equal_layers(num_layers: int, hidden_size: int) -> StackShape:
        """Layers of one size."""
        return StackShape(num_layers, hidden_size, (1 / num_layers,) * num_layers)


@dataclass(frozen=True)
class Choice:
    """What a policy says of the inputs of a batch.

    Attributes:
        paths: Bool `(batch, num_layers)`: layers that each input goes through; those before `first_layers` are taken
            whatever stands here.
        log_prob: `(batch,)`, with gradient: log-probability of a path that was drawn; only while training.
        gates: `(batch, num_layers)`, 1 for layers that run, with gradient: what a layer's contribution is multiplied
            by; only while training.
        probability: `(batch, num_layers)`: of each layer to be taken, where the policy has one.
        entropy: `(batch,)`, of the choice.
        complexity: `(batch,)`: how hard the input is, for policies that predict it.
    """

    paths: Tensor
    log_prob: Tensor | None = None
    gates: Tensor | None = None
    probability: Tensor | None = None
    entropy: Tensor | None = None
    complexity: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the inputs of a training batch.

    Attributes:
        losses: `(batch,)`: the task's loss of each input.
        spent: `(batch,)`: share of the stack's operations that its path took.
        distance: `(batch,)`, with gradient: how far what came out is from the full depth's: the squared distance over
            the full depth's square; None where nobody asked for it.
    """

    losses: Tensor
    spent: Tensor
    distance: Tensor | None = None


class DepthPolicy(nn.Module, ABC):
    """Base of all policies: built from (config, shape) for one model, asked once a batch.

    An input's path may depend on nothing but its own tokens. A subclass implements :meth:`choose`, and :meth:`stops`
    where the depth shows only on the way.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[DepthConfig]]

    def __init__(self, config: DepthConfig, shape: StackShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        if config.first_layers > shape.num_layers:
            raise ValueError(
                f"depth '{self.name}' lets {config.first_layers} first layers run, and the model has {shape.num_layers}"
            )

    @abstractmethod
    def choose(self, hidden: Tensor, seen: Tensor) -> Choice:
        """Choose the layers.

        Args:
            hidden: `(batch, length, hidden_size)`: what comes out of the first layers, of the embedding where there
                are none.
            seen: Bool `(batch, length)`: tokens that may be looked at, not padding and of a causal model only the
                first ones.
        """
        raise NotImplementedError

    def stops(self, layer: int, before: Tensor, after: Tensor, seen: Tensor) -> Tensor | None:
        """Which inputs go no further after a layer, bool `(batch,)`; None, the default: all follow their path.

        Args:
            layer: Its number.
            before: What it was given, `(batch, length, hidden_size)`.
            after: What it made of it.
            seen: As in :meth:`choose`.
        """
        return None

    @property
    def watches(self) -> bool:
        """Whether :meth:`stops` has to be asked after every layer."""
        return type(self).stops is not DepthPolicy.stops

    def losses(self, choice: Choice, outcome: Outcome) -> dict[str, Tensor]:
        """What the policy learns from, by name and already weighted; nothing by default."""
        return {}

    def spent(self, paths: Tensor) -> Tensor:
        """`(batch,)`: share of the stack's operations of paths `(batch, num_layers)`."""
        return (paths * torch.tensor(self.shape.costs, device=paths.device)).sum(-1)


def seen_mean(hidden: Tensor, seen: Tensor) -> Tensor:
    """`(batch, hidden_size)`: mean over the tokens that may be looked at, in float32."""
    weights = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    return (hidden.masked_fill(~seen[..., None], 0.0).float() * weights[..., None]).sum(1)
