"""The mode against its closed form, and the low-rank Gaussian against its law."""

from typing import Any

import pytest
import torch

from lowrank_bdl.errors import NonFiniteError
from lowrank_bdl.subspaces.map_estimate import low_rank_gaussian, map_estimate
from tests.statistical import assert_gaussian
from tests.subspaces.targets import WRONG, LinearGaussian
from tests.subspaces.test_log_joint import linear_model


@pytest.mark.parametrize("options", [{}, {"method": "adam", "num_steps": 400}], ids=["lbfgs", "adam"])
def test_the_mode_of_a_linear_gaussian_model_is_its_mean(options: dict[str, Any], generator: torch.Generator) -> None:
    target = LinearGaussian()
    found = map_estimate(target, initial="prior", generator=generator, **options)
    torch.testing.assert_close(found.mean, target.posterior()[0], rtol=0, atol=1e-6)
    top = target.log_likelihood(found.draws) + target.log_prior(found.draws)
    torch.testing.assert_close(found.log_joints, top)
    assert found.trace is not None and found.elbo is None
    assert found.trace.max().item() == pytest.approx(top.item(), abs=1e-6)
    assert found.num_evaluations == len(found.trace) + 1


def test_a_network_is_reached(generator: torch.Generator) -> None:
    log_joint, closed = linear_model(generator)
    torch.testing.assert_close(map_estimate(log_joint).mean, closed.posterior()[0], rtol=0, atol=1e-6)
    noisy = map_estimate(log_joint, method="adam", minibatch=True, num_steps=600, generator=generator)
    std = closed.posterior()[1].diagonal().sqrt()
    assert bool(((noisy.mean - closed.posterior()[0]).abs() < 0.2 * std).all())


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_target_has_another_mode(mistake: str) -> None:
    wrong = map_estimate(WRONG[mistake]()).mean
    assert (wrong - LinearGaussian().posterior()[0]).abs().max() > 1e-2


def test_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="method must be 'lbfgs' or 'adam'; got 'newton'"):
        map_estimate(LinearGaussian(), method="newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass method='adam' for minibatches"):
        map_estimate(LinearGaussian(), minibatch=True)
    with pytest.raises(NonFiniteError, match="log-joint must be finite; got nan"):
        map_estimate(LinearGaussian(observed=torch.full((4,), torch.nan).double()))


def test_low_rank_gaussian(generator: torch.Generator) -> None:
    target = LinearGaussian()
    draws = low_rank_gaussian(target, 1000, scale=0.5, generator=generator)
    law = torch.zeros(2).double(), 0.5 * torch.eye(2).double()
    assert_gaussian(draws.flat, *law)
    with pytest.raises(AssertionError, match="covariance"):
        assert_gaussian(draws.flat * 2**0.5, *law)  # the scale multiplies the variance
    torch.testing.assert_close(draws.log_joints, target.log_likelihood(draws.draws) + target.log_prior(draws.draws))
    with pytest.raises(ValueError, match="scale must be positive and finite; got 0"):
        low_rank_gaussian(target, 1, scale=0.0)
