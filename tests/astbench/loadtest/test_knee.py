"""The knee of a curve, in numbers and in words."""

import pytest

from astbench.loadtest.knee import knee


@pytest.mark.parametrize(
    ("points", "rate", "passed", "said"),
    [
        ([(1, 1.0), (2, 0.95), (4, 0.5)], 2, True, "2"),
        ([(4, 0.5), (1, 1.0), (2, 0.9)], 2, True, "2"),  # in any order; the share itself is held
        ([(1, 1.0), (2, 0.5), (4, 1.0)], 1, True, "1"),  # a rate above one that was not held does not count
        ([(1, 0.89), (2, 1.0)], None, True, "below the lowest rate tried"),
        ([(1, 1.0), (2.5, 0.9)], 2.5, False, "at least 2.5, no higher rate tried"),
    ],
)
def test_knee(points, rate, passed, said):
    found = knee(points, 0.9)
    assert (found.rate, found.passed, found.said()) == (rate, passed, said)
