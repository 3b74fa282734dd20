"""The flow against closed-form posteriors and evidence; skipped where zuko is not installed."""

from typing import Any

import pytest
import torch

from lowrank_bdl.subspaces import optional
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.normalizing_flow import normalizing_flow
from tests.statistical import assert_gaussian
from tests.subspaces.targets import WRONG, LinearGaussian
from tests.subspaces.test_log_joint import linear_model

pytest.importorskip("zuko", reason="normalizing_flow needs zuko, of the experiments extra")


def fit(target: Any, num_samples: int = 400, seed: int = 0, **options: Any) -> Draws:
    """400 draws: few enough for the fit's own error to be small beside their noise, enough to see mistakes."""
    settings = {"num_steps": 300, "transforms": 1, **options}
    return normalizing_flow(target, num_samples, generator=torch.Generator().manual_seed(seed), **settings)


def test_agrees_with_the_posterior_and_its_evidence() -> None:
    target = LinearGaussian(temperature=5.0)
    draws = fit(target)
    assert_gaussian(draws.flat, *target.posterior())
    assert draws.elbo is not None and draws.elbo.shape == (300,)
    gap = target.log_evidence() - draws.elbo[-50:].mean().item()
    assert -0.01 < gap < 0.05  # nats of KL divergence that the flow leaves; an incomplete constant is 0.5 or more
    torch.testing.assert_close(draws.log_joints, target.log_likelihood(draws.draws) + target.log_prior(draws.draws))
    assert draws.num_evaluations == 300 * 16 + 400


@pytest.mark.slow
@pytest.mark.parametrize("mistake", WRONG)
def test_the_test_has_power(mistake: str) -> None:
    """The likelihood that does not reach the flow, as released, among others."""
    if mistake == "scale":
        pytest.skip("a fifth of the likelihood at this temperature is below the noise of 400 draws")
    with pytest.raises(AssertionError, match="outside"):
        assert_gaussian(fit(WRONG[mistake](temperature=5.0)).flat, *LinearGaussian(temperature=5.0).posterior())


def test_a_network_is_reached(generator: torch.Generator) -> None:
    log_joint, closed = linear_model(generator)
    draws = fit(log_joint, 2000, num_draws=8, minibatch=True, num_steps=200)
    mean, covariance = closed.posterior()
    std = covariance.diagonal().sqrt()
    assert bool(((draws.mean - mean).abs() < 0.5 * std).all())
    assert bool((draws.flat.std(0) < 1.3 * std).all()) and bool((std < 0.6 * 0.7).all())  # the prior's is 0.7
    assert log_joint.num_evaluations == 2000


def test_same_seed_same_draws_and_the_global_generator_stays() -> None:
    state = torch.get_rng_state()
    one, two = (fit(LinearGaussian(), 5, num_steps=3) for _ in range(2))
    assert torch.equal(one.draws, two.draws) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.draws, fit(LinearGaussian(), 5, seed=1, num_steps=3).draws)


def test_one_coordinate() -> None:
    target = LinearGaussian(design=torch.ones(3, 1).double(), observed=torch.ones(3).double())
    assert_gaussian(fit(target, num_steps=200).flat, *target.posterior())


def test_refuses_bad_arguments_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="transforms must be at least 1; got 0"):
        fit(LinearGaussian(), transforms=0)
    with pytest.raises(ValueError, match="lr must be positive and finite; got 0"):
        fit(LinearGaussian(), lr=0.0)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"normalizing_flow needs zuko; pip install 'lowrank-bdl\[experiments\]'"):
        fit(LinearGaussian())
