"""What the tests of stochastic estimates share: matrices, and a test of error bars with a stated false-alarm rate."""

import torch
from scipy.stats import norm
from torch import Tensor

from lowrank_bdl.linalg.probing import StochasticEstimate
from tests.linalg.cases import Case
from tests.statistical import ALPHA

SIZE = 40
KINDS = ["low rank + diag", "indefinite", "clustered", "wide", "hessian"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(kind: str, size: int = SIZE) -> Tensor:
    """Return a symmetric float64 matrix; its eigenvectors are random, those of the low-rank one nearly so."""
    if kind == "low rank + diag":
        return Case((), size, 4).make()[1]
    g = seeded(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=g).double()).Q
    values = {
        "indefinite": torch.randn(size, generator=g).double(),
        "clustered": torch.cat((torch.tensor([10, 9.9, 9.8, 9.7, 9.6]), torch.rand(size - 5, generator=g))).double(),
        "wide": torch.logspace(-3, 1, size).double(),
        "hessian": torch.cat((1e-2 * torch.randn(size - 4, generator=g), torch.tensor([100, 30, 10, -5.0]))).double(),
    }[kind]
    return basis @ torch.diag(values) @ basis.mT


def stacked(estimates: list[StochasticEstimate]) -> tuple[Tensor, Tensor]:
    """Return values and standard errors of repetitions, ``(R, ...)`` each."""
    return torch.stack([e.value for e in estimates]), torch.stack([e.standard_error for e in estimates])


def assert_honest(values: Tensor, errors: Tensor, truth: Tensor, alpha: float = ALPHA) -> None:
    """Assert that R independent estimates ``(R, ...)`` are unbiased and that their squared error bars are so too.

    Both statistics are means of R independent numbers of mean zero: value - truth, and (value - truth)² - error².
    They are compared with the normal law at level ``alpha`` in all, shared evenly among entries and statistics. The
    second number is skewed (about 3), which makes the chance of a false alarm at R = 1000 some 4 times ``alpha``.
    """
    count = len(values)
    deviations = (values - truth).reshape(count, -1)
    bound = norm.isf(alpha / 4 / deviations.shape[1])
    for name, numbers in {
        "bias": deviations,
        "error bars": deviations.square() - errors.reshape(count, -1).square(),
    }.items():
        z = numbers.mean(0) / numbers.std(0) * count**0.5
        worst = z[z.abs().argmax()].item()
        assert abs(worst) < bound, f"{name}: {worst:.1f} standard deviations, {bound:.1f} allowed, R = {count}"
