"""Intervals against scipy's paired t-test, their coverage, and Holm's procedure against closed testing."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.study_statistics import holm, mean_interval, paired_difference

ALPHA = 1e-6  # chance that a right interval fails the test of its coverage


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_paired_difference_is_scipys(count: int, confidence: float) -> None:
    rng = np.random.default_rng(count)
    a, b = rng.normal(3.0, 2.0, count), rng.normal(2.5, 1.0, count)
    found = paired_difference(list(a), list(b), confidence)
    oracle = stats.ttest_rel(a, b)
    low, high = oracle.confidence_interval(confidence)
    assert found.count == count
    np.testing.assert_allclose(
        [found.mean, found.low, found.high, found.p_value], [(a - b).mean(), low, high, oracle.pvalue], rtol=1e-12
    )


@pytest.mark.parametrize("student", [True, False])
def test_the_interval_covers_as_often_as_it_says(student: bool) -> None:
    """Five seeds, 4,000 studies; the interval with a Gaussian quantile, which covers 88 %, must fail."""
    trials, n = 4000, 5
    draws = np.random.default_rng(0).normal(1.0, 2.0, (trials, n))
    narrower = 1.0 if student else stats.norm.ppf(0.975) / stats.t.ppf(0.975, n - 1)
    found = [mean_interval(list(row)) for row in draws]
    covered = sum(abs(interval.mean - 1.0) < narrower * interval.half_width for interval in found)
    low, high = stats.binom.ppf(ALPHA / 2, trials, 0.95), stats.binom.isf(ALPHA / 2, trials, 0.95)
    assert bool(low <= covered <= high) is student


def test_equal_differences_have_no_width() -> None:
    none, some = mean_interval([0.0, 0.0, 0.0]), mean_interval([0.1, 0.1, 0.1])
    assert (none.mean, none.half_width, none.p_value) == (0.0, 0.0, 1.0)
    assert (some.half_width, some.p_value) == (0.0, 0.0) and some.mean == pytest.approx(0.1, rel=1e-15)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected if every intersection it is part of is: adjusted p = the largest |S| min p over S."""
    count = len(p_values)
    subsets = [s for size in range(1, count + 1) for s in combinations(range(count), size)]
    oracle = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in range(count)]
    assert holm(p_values) == oracle


def test_holm_of_nothing_is_nothing() -> None:
    assert holm([]) == []


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2 values; got 1"):
        mean_interval([1.0])
    with pytest.raises(ValueError, match=r"must be finite; got \[1.0, nan\]"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\); got 1.0"):
        mean_interval([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="as many values as baseline values; got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]; got \[0.5, 1.5\]"):
        holm([0.5, 1.5])
