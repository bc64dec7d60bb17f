"""Student's interval against scipy's."""

import pytest
from scipy import stats

from astbench.tables.student import interval, quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 11, 40, 199])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.999])
def test_quantile(freedom, probability):
    assert quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, -0.1, 0.7], [5.0, 5.1, 4.9, 5.3, 4.6, 5.2]])
def test_interval(values):
    wanted = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert interval(values) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="two values or more, got 1"):
        interval([1.0])
