"""Tests of samplers with a stated false-alarm rate.

A correct sampler fails `assert_gaussian` with probability at most ALPHA on a fresh seed. The number of draws is fixed
in advance and a test draws once. The chi-square law of the covariance statistic is accurate for N >= 100 P (measured:
0.9e-2 to 1.1e-2 at a nominal 1e-2).
"""

import torch
from scipy.stats import chi2, kstest
from torch import Tensor

ALPHA = 1e-6
"""Chance that a correct sampler fails on a fresh seed, per call."""


def assert_gaussian(draws: Tensor, mean: Tensor, covariance: Tensor, alpha: float = ALPHA) -> None:
    """Assert that ``draws`` (N, P) have the given mean (P,) and full covariance (P, P), both float64."""
    number, size = draws.shape
    assert number >= 100 * size, f"needs N >= 100 P, got N = {number}, P = {size}"
    cholesky = torch.linalg.cholesky(covariance)
    z = torch.linalg.solve_triangular(cholesky, (draws.double() - mean).mT, upper=False).mT  # rows ~ N(0, I)
    scatter = z.mT @ z / number
    statistics = {
        "mean": (number * z.mean(0).square().sum().item(), size),
        "covariance": (number / 2 * (scatter - torch.eye(size).double()).square().sum().item(), size * (size + 1) // 2),
    }
    for name, (value, dof) in statistics.items():  # two statistics, two tails
        low, high = chi2.ppf(alpha / 4, dof), chi2.isf(alpha / 4, dof)
        assert low < value < high, f"{name}: {value:.1f} outside [{low:.1f}, {high:.1f}], N = {number}, P = {size}"


def assert_chi_square(squares: Tensor, dof: int, alpha: float = ALPHA) -> None:
    """Assert that squared Mahalanobis distances follow the chi-square law, by Kolmogorov-Smirnov at level ``alpha``."""
    result = kstest(squares.double().numpy(), "chi2", args=(dof,))
    assert result.pvalue > alpha, f"chi-square({dof}) coverage: p = {result.pvalue:.1e}, mean {squares.mean():.2f}"
