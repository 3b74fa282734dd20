"""Variational inference against closed forms: the posterior itself (full covariance), the mean-field optimum."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from lowrank_bdl.errors import NonFiniteError
from lowrank_bdl.subspaces.variational import gaussian_kl, variational
from tests.oracles import assert_close
from tests.statistical import assert_gaussian
from tests.subspaces.targets import WRONG, LinearGaussian, NoLikelihood
from tests.subspaces.test_log_joint import linear_model


def fit(target: Any, generator: torch.Generator, **options: Any) -> Any:
    return variational(target, 1, generator=generator, **{"num_steps": 300, **options})


def assert_is_posterior(draws: Any, target: LinearGaussian) -> None:
    """To 1e-4, where 300 steps end: the noise of the path derivative vanishes at the posterior."""
    mean, covariance = target.posterior()
    torch.testing.assert_close(draws.distribution.mean, mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(draws.distribution.covariance_matrix, covariance, rtol=0, atol=1e-4)


def test_kl_is_complete(generator: torch.Generator) -> None:
    scale = torch.randn(3, 3, generator=generator, dtype=torch.float64).tril(-1) + torch.diag(
        torch.tensor([0.3, 2.0, 1.0])
    )
    q = MultivariateNormal(torch.tensor([1.0, -2.0, 0.5]).double(), scale_tril=scale)
    prior = MultivariateNormal(torch.zeros(3).double(), 1.7**2 * torch.eye(3).double())
    assert_close(gaussian_kl(q.mean, scale, 1.7), kl_divergence(q, prior))


def test_full_covariance_is_the_posterior_and_the_elbo_the_evidence(generator: torch.Generator) -> None:
    target = LinearGaussian()
    draws = fit(target, generator, covariance="full")
    assert_is_posterior(draws, target)
    assert draws.elbo is not None and draws.elbo.shape == (300,)
    bound = draws.elbo[-50:].mean().item()  # of 200 draws; the likelihood's own noise is left
    assert bound == pytest.approx(target.log_evidence(), abs=0.15)


def test_draws_are_of_the_fitted_gaussian(generator: torch.Generator) -> None:
    target = LinearGaussian()
    draws = variational(target, 2000, covariance="full", num_steps=300, generator=generator)
    assert_gaussian(draws.flat, *target.posterior())
    torch.testing.assert_close(draws.log_joints, target.log_likelihood(draws.draws) + target.log_prior(draws.draws))
    assert draws.num_evaluations == 300 * 4 + 2000


@pytest.mark.parametrize("mistake", WRONG)
def test_the_tests_have_power(mistake: str, generator: torch.Generator) -> None:
    """The likelihood that does not reach z, as released, among others."""
    wrong = WRONG[mistake]()
    with pytest.raises(AssertionError, match="not close"):
        assert_is_posterior(fit(wrong, generator, covariance="full"), LinearGaussian())


def test_without_a_likelihood_it_is_the_prior(generator: torch.Generator) -> None:
    draws = fit(NoLikelihood(), generator, covariance="full")
    torch.testing.assert_close(draws.distribution.covariance_matrix, 1.69 * torch.eye(2).double(), rtol=0, atol=1e-4)


def test_mean_field_is_the_closed_form_optimum(generator: torch.Generator) -> None:
    """Mean of the posterior, variances one over the diagonal of its precision; within 2 %, the noise of 64 draws."""
    target = LinearGaussian(design=torch.tensor([[1.0, 0.9], [0.5, 0.8], [1.2, 1.0], [0.3, 0.1]]).double())
    mean, covariance = target.posterior()
    draws = fit(target, generator, num_draws=64)
    expected = 1 / torch.linalg.inv(covariance).diagonal()
    torch.testing.assert_close(draws.distribution.mean, mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(draws.distribution.variance, expected, rtol=0.02, atol=0)
    assert bool((expected < 0.8 * covariance.diagonal()).all())  # not the marginal variances
    assert draws.scale_tril[1, 0] == 0


def test_mean_field_is_exact_where_the_posterior_factorises(generator: torch.Generator) -> None:
    target = LinearGaussian(design=torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), observed=torch.ones(2).double())
    assert_is_posterior(fit(target, generator), target)


def test_a_network_is_reached(generator: torch.Generator) -> None:
    log_joint, closed = linear_model(generator)
    assert_is_posterior(fit(log_joint, generator, covariance="full"), closed)
    assert log_joint.num_evaluations == 300 * 4 + 1


def test_minibatches_fit_the_same_posterior(generator: torch.Generator) -> None:
    """Within a fifth of a standard deviation, which the noise of batches leaves; the prior is several away."""
    log_joint, closed = linear_model(generator)
    draws = fit(log_joint, generator, minibatch=True, num_steps=800, num_draws=8)
    mean, covariance = closed.posterior()
    assert bool(((draws.distribution.mean - mean).abs() < 0.2 * covariance.diagonal().sqrt()).all())
    assert log_joint.num_evaluations == 1  # the draw's log-joint alone needed all data


def test_the_mean_may_stay(generator: torch.Generator) -> None:
    draws = fit(LinearGaussian(), generator, fit_mean=False, initial=torch.tensor([0.3, -0.1]))
    torch.testing.assert_close(draws.distribution.mean, torch.tensor([0.3, -0.1]).double(), atol=1e-7, rtol=0)


def test_same_seed_same_fit() -> None:
    one, two = (fit(LinearGaussian(), torch.Generator().manual_seed(4), num_steps=5) for _ in range(2))
    assert torch.equal(one.location, two.location) and torch.equal(one.draws, two.draws)


def test_refuses_bad_arguments(generator: torch.Generator) -> None:
    for options, message in (
        ({"covariance": "block"}, "covariance must be 'diagonal' or 'full'; got 'block'"),
        ({"init_std": 0.0}, "init_std must be positive and finite; got 0.0"),
        ({"lr": math.inf}, "lr must be positive and finite; got inf"),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"num_draws": 0}, "num_draws must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(LinearGaussian(), generator, **options)
    with pytest.raises(TypeError, match="minibatches need estimate_log_likelihood; LinearGaussian has none"):
        fit(LinearGaussian(), generator, minibatch=True)
    with pytest.raises(NonFiniteError, match="objective must be finite; got .* at step 0 of variational inference"):
        fit(LinearGaussian(observed=torch.full((4,), torch.nan).double()), generator)
