"""What depth must cost at least: lower bounds on the operations of any choice of paths, from runs at several depths.

The runs evaluate the same items at fixed paths. A choice of paths sees something of an item, its group, and nothing
else. With c_p the share of operations of path p, a_gp how much of group g is right on it and w_g the group's share of
the items, the least that any choice (drawn at random too) can spend at accuracy A is

    min sum_g w_g sum_p x_gp c_p    where sum_g w_g sum_p x_gp a_gp >= A, sum_p x_gp = 1, x >= 0

which by duality is max over m >= 0 of m A + sum_g w_g min_p (c_p - m a_gp). With every item a group of its own this is
the bound for who knows which paths are right; with items grouped by a predictor's output, that for the predictor.

It is counted on the items that are evaluated, so it lies below what a choice made without seeing them can reach. Of the
bound in Transformer^-1 (arXiv 2501.16394) only the abstract was at hand, which says that there is one; this one is
derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def least_share(right: Array, costs: Array, weights: Array, accuracy: float) -> float | None:
    """The least mean share of operations at an accuracy; None where no choice of these paths reaches it.

    Args:
        right: `(groups, paths)`: how much of each group is right on each path, 0 to 1.
        costs: `(paths,)`: share of the operations of each.
        weights: `(groups,)`: share of the items in each; they sum to 1.
        accuracy: 0 to 1.
    """
    if float((weights * right.max(1)).sum()) < accuracy - 1e-12:
        return None
    # The dual is concave and piecewise linear: its maximum is at 0, or where two paths of a group change places.
    gain = right[:, :, None] - right[:, None, :]
    more = np.broadcast_to(costs[:, None] - costs[None, :], gain.shape)
    corners = np.unique(np.concatenate([[0.0], (more[gain > 1e-12] / gain[gain > 1e-12]).clip(0)]))
    dual = [m * accuracy + float((weights * (costs[None] - m * right).min(1)).sum()) for m in corners.tolist()]
    return max(dual)


def cheapest_right(right: Array, costs: Array) -> tuple[float, float]:
    """The oracle path: of each item the cheapest path that is right, the cheapest of all where none is.

    Args:
        right: `(items, paths)`, 0 or 1.
        costs: `(paths,)`.

    Returns: Mean share of the operations, and the share of items that are right.
    """
    price = np.where(right > 0, costs[None], np.inf).min(1)
    any_right = np.isfinite(price)
    return float(np.where(any_right, price, costs.min()).mean()), float(any_right.mean())


def by_value(values: Sequence[float], groups: int) -> NDArray[np.int64]:
    """Items in groups of equal size by a value: the group's number of each."""
    order = np.argsort(np.argsort(np.asarray(values), kind="stable"), kind="stable")
    return (order * groups) // len(values)


def grouped(right: Array, group: NDArray[np.int64]) -> tuple[Array, Array]:
    """How much of each group is right on each path, and the share of the items in it."""
    numbers = np.unique(group)
    rows = np.stack([right[group == number].mean(0) for number in numbers])
    return rows, np.array([(group == number).mean() for number in numbers])
