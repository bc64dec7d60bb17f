"""Options of a fixed depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from astbench_registry.depth.config import DepthConfig


@dataclass(frozen=True)
class StaticConfig(DepthConfig):
    """The same layers for every input: a shallower model.

    Args:
        layers: The first so many.
        path: Layer numbers from 0, in place of `layers`.
    """

    layers: int = 1
    path: list[int] | None = None

    conformance_options: ClassVar = {"layers": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layers >= 1, "layers", "at least 1 layer: a path of no layers is no model")
        path = self.path
        self.require(
            path is None or (len(path) > 0 and min(path) >= 0 and path == sorted({*path})),
            "path",
            "layer numbers from 0 in ascending order, at least one",
        )
