"""Options of Transformer^-1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from astbench_registry.depth.config import DepthConfig


@dataclass(frozen=True)
class TransformerInverseConfig(DepthConfig):
    """A small predictor of an input's complexity, and a policy that chooses its layers by it; both are learned.

    Args:
        cost: Price of the whole stack, in units of the task's loss: what a layer must bring to be worth it.
        look: First layers that always run; the predictor sees what comes out of them.
        choose: Any of the other layers, or only how many.
        estimator: How the policy learns: by policy gradient, or straight through the gates of layers that ran.
        distill: Weight of the distance between what comes out and what the full depth gives; above 0 every training
            step runs the full depth too.
        entropy: Weight of the choice's entropy, so that it goes on trying both.
        width: Of the predictor.
        start: Probability that a layer is taken, before anything is learned.
        lr: Peak learning rate of the policy; default: `--optim.lr`.
    """

    cost: float = 0.1
    look: int = 1
    choose: Literal["layers", "number"] = "layers"
    estimator: Literal["reinforce", "straight_through"] = "reinforce"
    distill: float = 0.0
    entropy: float = 0.01
    width: int = 32
    start: float = 0.8
    lr: float | None = None

    paper: ClassVar = "Transformer^-1, 2025, arXiv 2501.16394"
    learns: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.cost >= 0, "cost", "0 or more")
        self.require(self.look >= 1, "look", "at least 1 layer: a path of no layers is no model")
        self.require(self.choose in ("layers", "number"), "choose", "layers or number")
        self.require(self.estimator in ("reinforce", "straight_through"), "estimator", "reinforce or straight_through")
        self.require(self.distill >= 0, "distill", "0 or more")
        self.require(self.entropy >= 0, "entropy", "0 or more")
        self.require(1 <= self.width <= 65_536, "width", "1 to 65536")
        self.require(0 < self.start < 1, "start", "between 0 and 1")
        self.require(self.lr is None or self.lr > 0, "lr", "above 0")

    @property
    def first_layers(self) -> int:
        """See the base class."""
        return self.look

    @property
    def distills(self) -> bool:
        """See the base class."""
        return self.distill > 0
