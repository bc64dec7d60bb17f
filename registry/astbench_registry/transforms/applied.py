"""A transform at work in one layer: what the layer's calls are handed, and what it left of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from astbench_registry.errors import CapabilityError
from astbench_registry.transforms.interface import Transform
from astbench_registry.transforms.values import ValueCounts

MOST_VALUES = 64
"""Different values that are counted; of more it is only known that there are more."""


@dataclass(frozen=True)
class Counted:
    """What a layer's weights were after a transform.

    Attributes:
        nonzero: By head, weights above zero.
        mass: By head, their sum.
        visible: Visible pairs of each head.
        rows: Query rows that see something.
        values: The different weights of visible pairs; None: more than MOST_VALUES.
    """

    nonzero: tuple[float, ...]
    mass: tuple[float, ...]
    visible: float
    rows: float
    values: frozenset[float] | None

    @property
    def zeros(self) -> list[float]:
        """By head, the share of zeros among the visible pairs."""
        return [1 - n / max(1.0, self.visible) for n in self.nonzero]

    @property
    def row_sums(self) -> list[float]:
        """By head, the mean sum of a row's weights."""
        return [m / max(1.0, self.rows) for m in self.mass]

    def __add__(self, other: Counted) -> Counted:
        """The same layer in two processes."""
        return Counted(
            tuple(a + b for a, b in zip(self.nonzero, other.nonzero, strict=True)),
            tuple(a + b for a, b in zip(self.mass, other.mass, strict=True)),
            self.visible + other.visible,
            self.rows + other.rows,
            union_of_values([self.values, other.values]),
        )


def union_of_values(parts: Iterable[frozenset[float] | None]) -> frozenset[float] | None:
    """All different values of several sets; None where one is, or they are more than MOST_VALUES together."""
    found: frozenset[float] = frozenset()
    for part in parts:
        if part is None:
            return None
        found |= part
    return found if len(found) <= MOST_VALUES else None


class AppliedTransform:
    """Changes the weights of a layer, or only looks at them, and counts.

    Attributes:
        transform: None in a layer that is left as it is.
        watching: Set, weights are counted there, as they are after the transform.
        calibrating: Set, weights are counted there and left as they are.
        counting: Whether zeros and values are counted.
    """

    def __init__(self, transform: Transform | None, heads: int) -> None:
        self.transform = transform
        self.watching: ValueCounts | None = None
        self.calibrating: ValueCounts | None = None
        self.counting = False
        self._nonzero = torch.zeros(heads, dtype=torch.float64)
        self._mass = torch.zeros(heads, dtype=torch.float64)
        self._visible = self._rows = 0.0
        self._values: set[float] | None = set()

    def __call__(self, weights: Tensor, visible: Tensor) -> Tensor:
        """See :class:`Transform`.

        Raises:
            CapabilityError: the transform returns something else than weights of that shape and dtype, or weights of
                pairs that the mask hides, which would be scored as if the model had not looked ahead.
        """
        if self.calibrating is not None:
            self.calibrating.add(weights, visible)
            return weights
        changed = weights
        if self.transform is not None:
            changed = self.transform(weights, visible)
            if changed.shape != weights.shape or changed.dtype != weights.dtype:
                raise CapabilityError(
                    f"transform '{self.transform.name}' must return weights {tuple(weights.shape)} in {weights.dtype}, "
                    f"got {tuple(changed.shape)} in {changed.dtype}"
                )
            if bool(changed.masked_fill(visible, 0.0).any()):
                raise CapabilityError(
                    f"transform '{self.transform.name}' gives weight to pairs that the mask hides, and must leave them "
                    f"0; see astbench check {self.transform.name}"
                )
        if self.watching is not None:
            self.watching.add(changed, visible)
        if self.counting:
            self._count(changed, visible)
        return changed

    def _count(self, changed: Tensor, visible: Tensor) -> None:
        # Over the heads' own axis alone: one number each.
        self._nonzero += changed.count_nonzero((0, 2, 3)).double().cpu()
        self._mass += changed.sum((0, 2, 3), dtype=torch.float64).cpu()
        self._visible += float(visible.sum())
        self._rows += float(visible.any(-1).sum())
        if self._values is not None:
            found = different_values(changed, MOST_VALUES)
            if found is not None and not bool((visible & (changed == 0)).any()):
                found -= {0.0}  # it was of hidden pairs
            self._values = None if found is None else self._values | found
            if self._values is not None and len(self._values) > MOST_VALUES:
                self._values = None

    @property
    def counted(self) -> Counted:
        """What was counted so far."""
        values = None if self._values is None else frozenset(self._values)
        return Counted(tuple(self._nonzero.tolist()), tuple(self._mass.tolist()), self._visible, self._rows, values)


def different_values(weights: Tensor, most: int) -> set[float] | None:
    """The different numbers in a tensor; None where there are more than `most`.

    One pass for each: cheap where there are few, as after quantisation, and given up early where there are many.
    """
    x = weights[weights != 0]
    if len(x[: 4 * most].unique()) > most:
        return None
    found = {0.0} if x.numel() < weights.numel() else set[float]()
    while x.numel():
        if len(found) > most:
            return None
        largest = x.max()
        found.add(float(largest))
        x = x[x < largest]
    return found
