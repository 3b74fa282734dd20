"""SGLD and SGHMC against the exact law of their own recursion on a linear-Gaussian model, and that law's limit.

One step is linear, so its stationary covariance solves C = A C A' + Q. Thousands of chains side by side give
independent draws.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import CheckpointError, NonFiniteError
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.langevin import sghmc, sgld
from tests.statistical import assert_gaussian
from tests.subspaces.targets import WRONG, LinearGaussian
from tests.subspaces.test_log_joint import linear_model

LR, BETA = 0.1, 0.6
METHODS: dict[str, Callable[..., Draws]] = {"SGLD": sgld, "SGHMC": lambda *a, **o: sghmc(*a, momentum=BETA, **o)}


def stationary(name: str, target: LinearGaussian, lr: float = LR) -> Tensor:
    """Covariance of z under the recursion, (k, k)."""
    eye, pull = torch.eye(2).double(), lr * torch.linalg.inv(target.posterior()[1])
    if name == "SGLD":
        a, q = eye - pull, 2 * lr * eye
    else:
        noise = 2 * (1 - BETA) * lr * eye
        a = torch.cat([torch.cat([eye - pull, BETA * eye], 1), torch.cat([-pull, BETA * eye], 1)])
        q = torch.cat([torch.cat([noise, noise], 1), torch.cat([noise, noise], 1)])
    system = torch.eye(len(a) ** 2).double() - torch.kron(a, a)
    return torch.linalg.solve(system, q.reshape(-1)).reshape(a.shape)[:2, :2]


def last_states(name: str, target: Any, generator: torch.Generator, **options: Any) -> Tensor:
    settings = {"lr": LR, "num_chains": 1500, "burn_in": 60, "initial": "prior", **options}
    return METHODS[name](target, 1, generator=generator, **settings).flat


@pytest.mark.parametrize("name", METHODS)
def test_agrees_with_the_law_of_the_recursion(name: str, generator: torch.Generator) -> None:
    target = LinearGaussian()
    draws = last_states(name, target, generator)
    assert_gaussian(draws, target.posterior()[0], stationary(name, target))


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("name", METHODS)
def test_the_test_has_power(name: str, mistake: str, generator: torch.Generator) -> None:
    target = LinearGaussian()
    with pytest.raises(AssertionError, match="outside"):
        assert_gaussian(last_states(name, WRONG[mistake](), generator), target.posterior()[0], stationary(name, target))


@pytest.mark.parametrize("name", METHODS)
def test_that_law_is_the_posterior_as_the_step_goes_to_zero(name: str) -> None:
    target = LinearGaussian()
    covariance = target.posterior()[1]
    bias = [(stationary(name, target, lr) - covariance).abs().max().item() for lr in (1e-2, 1e-3, 1e-4)]
    assert bias[2] < 1e-4
    assert bias[0] / bias[1] == pytest.approx(10, rel=0.1) and bias[1] / bias[2] == pytest.approx(10, rel=0.1)


def test_without_momentum_sghmc_is_sgld() -> None:
    one = sgld(LinearGaussian(), 5, lr=LR, generator=torch.Generator().manual_seed(1))
    two = sghmc(LinearGaussian(), 5, lr=LR, momentum=0.0, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.draws, two.draws, rtol=1e-12, atol=0)
    assert (one.method, two.method) == ("SGLD", "SGHMC") and one.num_evaluations == 6
    target = LinearGaussian()
    torch.testing.assert_close(one.log_joints, target.log_likelihood(one.draws) + target.log_prior(one.draws))


@pytest.mark.parametrize("minibatch", [False, True])
def test_a_network_is_reached(minibatch: bool, generator: torch.Generator) -> None:
    """The mean within 5 standard errors (a false alarm in 9e5 a coordinate); minibatches leave it where it is."""
    log_joint, closed = linear_model(generator)
    mean, covariance = closed.posterior()
    lr = 0.02 * covariance.diagonal().min().item()
    chains = 3 if minibatch else 50
    draws = sgld(log_joint, 60, lr=lr, minibatch=minibatch, num_chains=chains, burn_in=150, thin=5, generator=generator)
    error = (draws.covariance.diagonal() / draws.ess()).sqrt()
    assert bool(((draws.mean - mean).abs() < 5 * error).all())
    assert bool((draws.mean.abs() > 5 * error).any())  # not where it started
    assert (log_joint.num_evaluations == 0) is minibatch


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("minibatch", [False, True])
def test_resumed_chains_are_the_same_to_the_last_bit(name: str, minibatch: bool, tmp_path: Path) -> None:
    def run(num_samples: int, seed: int, **options: Any) -> Draws:
        log_joint, _ = linear_model(torch.Generator().manual_seed(0))
        settings = {"lr": 0.01, "num_chains": 2, "burn_in": 3, "minibatch": minibatch, **options}
        return METHODS[name](log_joint, num_samples, generator=torch.Generator().manual_seed(seed), **settings)

    path = tmp_path / "chain"
    whole = run(8, 1)
    run(3, 1, checkpoint=path)
    longer = run(8, 2, checkpoint=path, resume=True)
    assert torch.equal(longer.draws, whole.draws) and torch.equal(longer.log_joints, whole.log_joints)
    with pytest.raises(CheckpointError, match="lr was 0.01, now 0.02"):
        run(8, 1, lr=0.02, checkpoint=path, resume=True)


def test_refuses_bad_arguments(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="lr must be positive and finite; got 0"):
        sgld(LinearGaussian(), 1, lr=0.0)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\); got 1.0"):
        sghmc(LinearGaussian(), 1, lr=0.1, momentum=1.0)
    with pytest.raises(TypeError, match="minibatches need estimate_log_likelihood; LinearGaussian has none"):
        sgld(LinearGaussian(), 1, lr=0.1, minibatch=True)
    with pytest.raises(NonFiniteError, match="SGLD diverged at step .*; use a smaller step size"):
        sgld(LinearGaussian(), 2000, lr=50.0, initial="prior", generator=generator)
