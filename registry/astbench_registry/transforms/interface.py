"""The one interface of every transform: probabilities in, what sums values out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from astbench_registry.interface import AttentionShape
from astbench_registry.transforms.config import TransformConfig
from astbench_registry.transforms.values import ValueCounts


class Transform(ABC):
    """Base of all transforms: built from (config, shape) for one layer, called with its weights.

    It has no parameters and is no module, so that any checkpoint loads with it. A subclass implements
    :meth:`__call__`, and :meth:`start` where its config says `calibrated`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[TransformConfig]]

    def __init__(self, config: TransformConfig, shape: AttentionShape) -> None:
        self.config = config
        self.shape = shape

    @abstractmethod
    def __call__(self, weights: Tensor, visible: Tensor) -> Tensor:
        """Change the weights of some query rows; a new tensor, the given one stays as it is.

        A row's result may depend on nothing but that row: rows come some at a time.

        Args:
            weights: `(batch, num_heads, rows, keys)`, float32 or more: probabilities, zero for pairs that are not
                attended to. Rows that see nothing, and rows of padding, are zero.
            visible: Bool `(batch, 1, rows, keys)`: True for pairs that the mask shows. Others must stay zero.

        Returns:
            As `weights`.
        """
        raise NotImplementedError

    def start(self, own: ValueCounts, everywhere: ValueCounts) -> None:
        """Begin from attention values of other texts, before the first call; only for calibrated ones.

        Args:
            own: Values of this layer, by its heads.
            everywhere: Values of all transformed layers, as of one head.
        """
        raise NotImplementedError(f"transform '{self.name}' declares calibrated and does not start from values")

    def facts(self) -> dict[str, object]:
        """Numbers of this layer that the record should hold, such as thresholds that were found; none by default."""
        return {}
