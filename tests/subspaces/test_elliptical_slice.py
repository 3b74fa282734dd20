"""Elliptical slice sampling against closed-form posteriors: full covariance, at the alarm rate of tests.statistical.

Thousands of chains side by side give independent draws: the last state of each, started from the prior.
"""

import pytest
import torch

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.subspaces.elliptical_slice import elliptical_slice
from tests.statistical import assert_gaussian
from tests.subspaces.targets import LinearGaussian, NoLikelihood, TemperedPrior, WrongScale

CHAINS, STEPS = 2000, 20


def last_states(target: LinearGaussian, generator: torch.Generator, steps: int = STEPS) -> torch.Tensor:
    draws = elliptical_slice(target, 1, num_chains=CHAINS, burn_in=steps - 1, initial="prior", generator=generator)
    return draws.flat


def test_agrees_with_the_posterior(generator: torch.Generator) -> None:
    target = LinearGaussian()
    assert_gaussian(last_states(target, generator), *target.posterior())


def test_leaves_the_posterior_invariant(generator: torch.Generator) -> None:
    """One step from exact draws; a mistake in the step itself would be seen before it is forgotten."""
    target = LinearGaussian()
    mean, covariance = target.posterior()
    start = (
        torch.randn(CHAINS, 2, dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(covariance).mT + mean
    )
    draws = elliptical_slice(target, 1, num_chains=CHAINS, initial=start, generator=generator)
    assert_gaussian(draws.flat, mean, covariance)


@pytest.mark.parametrize(
    "wrong",
    [
        LinearGaussian(prior_std=30.0),  # as good as none
        LinearGaussian(prior_std=1.0),
        TemperedPrior(prior_std=1.3 * 1.7**0.5),  # this sampler takes the prior from prior_std alone
        WrongScale(),
        LinearGaussian(temperature=1.0),
        NoLikelihood(),
    ],
    ids=["no prior", "narrow prior", "temperature on the prior", "scale", "no temperature", "no likelihood"],
)
def test_the_test_has_power(wrong: LinearGaussian, generator: torch.Generator) -> None:
    with pytest.raises(AssertionError, match="outside"):
        assert_gaussian(last_states(wrong, generator), *LinearGaussian().posterior())


def test_one_long_chain_has_the_posteriors_moments_within_its_own_standard_error(generator: torch.Generator) -> None:
    """Five standard errors by the chain's effective sample size: a false alarm in 9e5 for each of two coordinates."""
    target = LinearGaussian()
    draws = elliptical_slice(target, 100, burn_in=20, num_chains=20, initial="prior", generator=generator)
    mean, covariance = target.posterior()
    error = (covariance.diagonal() / draws.ess()).sqrt()
    assert bool(((draws.mean - mean).abs() < 5 * error).all())
    assert bool((draws.rhat() < 1.06).all()) and bool((draws.ess() > 300).all())


def test_the_record_is_of_the_draws(generator: torch.Generator) -> None:
    target = LinearGaussian()
    draws = elliptical_slice(target, 7, num_chains=3, burn_in=2, thin=2, generator=generator)
    expected = target.log_likelihood(draws.draws) + target.log_prior(draws.draws)
    torch.testing.assert_close(draws.log_joints, expected, rtol=1e-12, atol=1e-12)
    assert draws.accept is not None and bool(((draws.accept > 0) & (draws.accept <= 1)).all())
    assert draws.num_evaluations >= 3 * (1 + 2 + 14)  # the start, and at least one proposal a step
    assert draws.seconds > 0 and draws.method == "elliptical slice"


def test_every_proposal_costs_one_evaluation(generator: torch.Generator) -> None:
    """The log-likelihood of the present state is kept."""
    draws = elliptical_slice(LinearGaussian(), 50, generator=generator)
    assert draws.accept is not None
    assert draws.num_evaluations == 1 + round((1 / draws.accept).sum().item())


def test_a_chain_does_not_depend_on_the_others(generator: torch.Generator) -> None:
    one, three = (
        elliptical_slice(LinearGaussian(), 9, num_chains=count, generator=torch.Generator().manual_seed(5))
        for count in (1, 3)
    )
    torch.testing.assert_close(three.draws[0], one.draws[0], rtol=1e-12, atol=0)
    assert not torch.equal(three.draws[0], three.draws[1])


def test_a_network_that_fails_is_left(generator: torch.Generator) -> None:
    """NaN is no value above the threshold; infinities neither."""

    class Broken(LinearGaussian):
        def log_likelihood(self, z: torch.Tensor) -> torch.Tensor:
            return super().log_likelihood(z).where(z[..., 0] < 0.5, torch.nan)

    draws = elliptical_slice(Broken(), 40, num_chains=4, generator=generator)
    assert bool((draws.draws[..., 0] < 0.5).all()) and bool(draws.log_joints.isfinite().all())


def test_refuses_bad_input(generator: torch.Generator) -> None:
    target = LinearGaussian()
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        elliptical_slice(target, 0)
    with pytest.raises(ValueError, match="thin must be at least 1; got 0"):
        elliptical_slice(target, 1, thin=0)
    with pytest.raises(ValueError, match="burn_in must be at least 0; got -1"):
        elliptical_slice(target, 1, burn_in=-1)
    with pytest.raises(ShapeError, match=r"initial must have shape \(2,\) or \(3, 2\); got \(3,\)"):
        elliptical_slice(target, 1, num_chains=3, initial=torch.zeros(3))
    with pytest.raises(ValueError, match="coordinates, 'prior' or None; got 'mode'"):
        elliptical_slice(target, 1, initial="mode")
    with pytest.raises(NonFiniteError, match="initial must be finite"):
        elliptical_slice(target, 1, initial=torch.tensor([0.0, torch.nan]))
    far = LinearGaussian(observed=torch.full((4,), torch.inf).double())
    with pytest.raises(NonFiniteError, match="log-likelihood must be finite where chains start"):
        elliptical_slice(far, 1)
    with pytest.raises(ValueError, match="resume needs a checkpoint"):
        elliptical_slice(target, 1, resume=True)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1; got 0"):
        elliptical_slice(target, 1, checkpoint_every=0)
    with pytest.raises(ShapeError, match=r"log_likelihood must give \(1,\) of z \(1, 2\); got \(\)"):
        target.log_likelihood = lambda z: z.sum()  # type: ignore[method-assign]
        elliptical_slice(target, 1)
