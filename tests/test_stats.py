"""Intervals: against scipy, by hand, and on bad input."""

import pytest
import torch
from scipy.stats import binomtest, ttest_1samp

from helpers import metrics, stats
from helpers.stats import student_interval, wilson_interval


@pytest.mark.parametrize("values", [[1.0, 2, 3], [-0.3, 0.5], [0.05, 0.06, 0.12, 0.1, -4]])
def test_student_interval_equals_scipy(values):
    wanted = ttest_1samp(values, 0).confidence_interval(0.95)
    expected = (sum(values) / len(values), *wanted)
    assert student_interval(values) == pytest.approx(expected, rel=1e-12)
    as_tensor = torch.tensor(values, dtype=torch.float64)
    assert student_interval(as_tensor) == pytest.approx(expected, rel=1e-12)


def test_student_interval_by_hand():
    assert student_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.48, 4.48), abs=5e-3)


def test_student_interval_of_equal_values_and_of_too_few():
    assert student_interval(torch.full((3,), 0.25)) == (0.25, 0.25, 0.25)
    for values in ([0.5], [], [[0.1, 0.2], [0.3, 0.4]]):
        with pytest.raises(ValueError, match=r"two or more|values.* give a"):
            student_interval(values)


@pytest.mark.parametrize(("k", "n"), [(5, 10), (0, 50), (50, 50), (1, 250)])
def test_wilson_interval_equals_scipy(k, n):
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(k / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_wilson_interval_by_hand():
    assert wilson_interval(0.5, 10) == pytest.approx((0.237, 0.763), abs=5e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_wilson_interval_stays_inside_and_has_a_width_at_the_ends(share):
    low, high = wilson_interval(share, 8)
    assert 0 <= low < high <= 1 and (low == 0.0 if share == 0 else high == 1.0)


@pytest.mark.parametrize(("share", "n"), [(2.0, 10), (-0.1, 10), (0.5, 0), (float("nan"), 10)])
def test_wilson_interval_refuses(share, n):
    with pytest.raises(ValueError, match=r"share is .* 0 to 1|n is 0: give a whole number"):
        wilson_interval(share, n)


def test_there_is_one_of_each():
    """What metrics offers under these names is this."""
    assert metrics.student_interval is stats.student_interval
    assert metrics.wilson_interval is stats.wilson_interval
