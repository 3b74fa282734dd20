"""Paired comparisons over seeds: mean differences with Student's t intervals, and Holm's adjustment of p-values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """Mean of n values with a confidence interval for their expectation.

    Attributes:
        mean: Of the values.
        half_width: Of the interval, symmetric about the mean; in the unit of the values.
        p_value: Two-sided, of the hypothesis that the expectation is 0.
        count: n.
    """

    mean: float
    half_width: float
    p_value: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "p_value": self.p_value, "count": self.count}


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    r"""Interval of Student's t, :math:`\bar x \pm t_{n-1}((1 + c) / 2) \, s / \sqrt n`.

    It has its confidence c exactly if the values are independent draws of one Gaussian: for differences between two
    methods over seeds, given the data (and, where the test set is one and the same for all seeds, given that test set).
    Values that are all equal give a width of 0, and a p-value of 1 if they are 0 and of 0 otherwise.

    Args:
        values: n numbers, one a seed; at least two.
        confidence: c, in (0, 1).

    Raises:
        ValueError: If there are fewer than two values, one is not finite, or the confidence is out of range.
    """
    from scipy import stats

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}")
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 values; got {found.size}")
    if not np.isfinite(found).all():
        raise ValueError(f"values must be finite; got {list(values)}")
    count, mean = len(found), float(found.mean())
    error = 0.0 if (found == found[0]).all() else float(found.std(ddof=1)) / math.sqrt(count)
    if error == 0:
        return Interval(mean, 0.0, 1.0 if mean == 0 else 0.0, count)
    half_width = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return Interval(mean, half_width, 2 * float(stats.t.sf(abs(mean) / error, count - 1)), count)


def paired_difference(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of the mean of `values` − `baseline`, both in the order of the same seeds.

    Raises:
        ValueError: If they differ in number; and as `mean_interval`.
    """
    if len(values) != len(baseline):
        raise ValueError(f"pairs need as many values as baseline values; got {len(values)} and {len(baseline)}")
    return mean_interval([a - b for a, b in zip(values, baseline, strict=True)], confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number m, so that rejecting those below α errs anywhere with probability at most α.

    The i-th smallest becomes the largest of (m − j + 1) p_j over j <= i, and at most 1. No independence is needed.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Args:
        p_values: m numbers in [0, 1].

    Raises:
        ValueError: If one is outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must be in [0, 1]; got {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
