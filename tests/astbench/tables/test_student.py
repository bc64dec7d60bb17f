"""Student's interval and test against scipy's."""

import numpy as np
import pytest
from scipy import stats

from astbench.tables.student import holm, interval, p_value, quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 11, 40, 199])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.999])
def test_quantile(freedom, probability):
    assert quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, -0.1, 0.7], [5.0, 5.1, 4.9, 5.3, 4.6, 5.2]])
def test_interval(values):
    wanted = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert interval(values) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_weights_make_it_the_interval_of_the_weighted_mean():
    values = [0.3, -0.1, 0.7, 0.2]
    assert interval(values, weights=[7.0] * 4) == pytest.approx(interval(values))
    low, high = interval(values, weights=[127, 127, 2, 127])
    assert (low + high) / 2 == pytest.approx((127 * 0.4 + 2 * 0.7) / 383), "the short one counts for little"
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):  # windows of 2 to 128 tokens, the short ones worse
        tokens = rng.integers(2, 129, 40)
        means = 3 + 30 / tokens + rng.normal(size=40)
        low, high = interval(means.tolist(), weights=tokens.tolist())
        covered += low < 3 + 30 / 65 < high
    assert 0.91 < covered / 600 < 0.98


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, -0.1, 0.7], [5.0, 5.1, 4.9, 5.3, 4.6, 5.2], [-1.0, 1.0]])
def test_p_value(values):
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=1e-9)


def test_values_that_are_all_the_same():
    assert p_value([0.0, 0.0]) == 1.0 and p_value([0.5, 0.5]) == 0.0


def test_holm_by_hand():
    """Four tests: the smallest times 4, the next times 3, none below the one before it, at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="two values or more, got 1"):
        interval([1.0])
