"""Lower bounds on what depth costs, against linear programmes and by hand."""

import numpy as np
import pytest
from scipy.optimize import linprog

from astbench.analysis.depth_bound import by_value, cheapest_right, grouped, least_share


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_linear_programmes_minimum(seed):
    rng = np.random.default_rng(seed)
    right, costs, weights = rng.random((5, 3)), rng.random(3), rng.dirichlet(np.ones(5))
    for accuracy in (0.0, 0.4, 0.6, 0.7, 0.8):
        primal = linprog(
            (weights[:, None] * costs).ravel(),
            A_ub=-(weights[:, None] * right).reshape(1, -1),
            b_ub=[-accuracy],
            A_eq=np.kron(np.eye(5), np.ones(3)),
            b_eq=np.ones(5),
        )
        found = least_share(right, costs, weights, accuracy)
        assert (found is None) == (primal.status == 2)
        if found is not None:
            assert found == pytest.approx(primal.fun, abs=1e-9)


def test_by_hand():
    right, costs = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), np.array([0.25, 1.0])
    assert cheapest_right(right, costs) == (pytest.approx((0.25 + 1 + 0.25 + 0.25) / 4), 0.75)
    own = np.full(4, 0.25)
    assert least_share(right, costs, own, 0.75) == pytest.approx((3 * 0.25 + 1) / 4)
    assert least_share(right, costs, own, 0.5) == pytest.approx(0.25), "the cheap path gets that far"
    assert least_share(right, costs, own, 0.8) is None
    assert least_share(right.mean(0)[None], costs, np.ones(1), 0.5) == pytest.approx(0.25)
    assert least_share(right.mean(0)[None], costs, np.ones(1), 0.6) is None, "who knows nothing cannot choose"


def test_groups_are_of_equal_size_in_the_order_of_the_value():
    group = by_value([0.3, 0.1, 0.9, 0.2, 0.8, 0.5], 3)
    assert group.tolist() == [1, 0, 2, 0, 2, 1]
    rows, weights = grouped(np.array([[1.0], [0.0], [1.0], [1.0], [1.0], [0.0]]), group)
    assert rows.tolist() == [[0.5], [0.5], [1.0]] and weights.tolist() == pytest.approx([1 / 3] * 3)
