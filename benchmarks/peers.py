"""The other ways to hold and use such a Gaussian, with the same inputs and no copies beyond their own."""

import warnings
from typing import Any

import gpytorch
import torch
from torch import Tensor

import lowrank_bdl as lb
from benchmarks.problems import GaussianProblem

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # linear_operator scripts a function when it is imported; newer torch deprecates that
    from linear_operator.operators import (
        DiagLinearOperator,
        LowRankRootAddedDiagLinearOperator,
        LowRankRootLinearOperator,
    )

OURS = "lowrank_bdl"
HAND = "hand-written"
SHIPPED = "gpytorch as shipped"
MIXED = "gpytorch class, our operator"
TORCH = "torch LowRankMultivariateNormal"
RELEASED = "per-tensor collector"
AVERAGED = "AveragedModel"


def operator(problem: GaussianProblem) -> lb.LowRankPlusDiagLinearOperator:
    """Return a new operator of ours."""
    return lb.LowRankPlusDiagLinearOperator(problem.storage.mT, problem.diag)


def posterior(problem: GaussianProblem) -> Any:
    """Return a new posterior of ours."""
    from lowrank_bdl.posteriors.gaussian import GaussianPosterior

    return GaussianPosterior(problem.mean, operator(problem), problem.layout)


def distribution(problem: GaussianProblem) -> lb.MultivariateNormal:
    """Return a new distribution of ours."""
    return lb.MultivariateNormal(problem.mean, operator(problem))


def shipped_operator(root: Tensor, diag: Tensor) -> Any:
    """Return linear_operator's own class."""
    return LowRankRootAddedDiagLinearOperator(LowRankRootLinearOperator(root), DiagLinearOperator(diag))


def shipped(problem: GaussianProblem) -> Any:
    """Return gpytorch's distribution over linear_operator's class."""
    operator = shipped_operator(problem.storage.mT, problem.diag)
    return gpytorch.distributions.MultivariateNormal(problem.mean, operator)


def mixed(problem: GaussianProblem) -> Any:
    """Return gpytorch's plain distribution over our operator."""
    return gpytorch.distributions.MultivariateNormal(problem.mean, operator(problem))


def torch_normal(
    problem: GaussianProblem, mean: Tensor | None = None, diag: Tensor | None = None
) -> torch.distributions.LowRankMultivariateNormal:
    """Return torch's own low-rank distribution."""
    return torch.distributions.LowRankMultivariateNormal(
        problem.mean if mean is None else mean,
        problem.storage.mT,
        problem.diag if diag is None else diag,
        validate_args=False,
    )


def torch_normal_variance(normal: torch.distributions.LowRankMultivariateNormal) -> Tensor:
    """Return the marginal variances of torch's distribution, computed anew (it caches them)."""
    normal.__dict__.pop("variance", None)
    return normal.variance
