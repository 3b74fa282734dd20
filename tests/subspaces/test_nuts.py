"""NUTS against closed-form posteriors, on its full covariance; skipped where Pyro is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.subspaces import optional
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.nuts import nuts
from tests.statistical import assert_gaussian
from tests.subspaces.targets import ForgottenPrior, LinearGaussian, NoLikelihood, TemperedPrior
from tests.subspaces.test_log_joint import linear_model

pytest.importorskip("pyro", reason="nuts needs pyro-ppl, of the experiments extra")


def run(target: Any, num_samples: int, seed: int = 0, **options: Any) -> Draws:
    settings = {"burn_in": 150, "initial": "prior", **options}
    return nuts(target, num_samples, generator=torch.Generator().manual_seed(seed), **settings)


def independent(target: LinearGaussian) -> torch.Tensor:
    """Two paths from each of 240 independent exact draws: draws again, if paths leave the posterior as it is."""
    mean, covariance = LinearGaussian(temperature=5.0).posterior()
    noise = torch.randn(240, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    start = mean + noise @ torch.linalg.cholesky(covariance).mT
    return run(target, 1, num_chains=240, burn_in=0, step_size=0.5, thin=2, initial=start).flat


def test_leaves_the_posterior_as_it_is() -> None:
    target = LinearGaussian(temperature=5.0)
    assert_gaussian(independent(target), *target.posterior())


def test_finds_the_posterior() -> None:
    """The mean within 5 standard errors by the chain's own effective sample size; started far away."""
    target = LinearGaussian(temperature=5.0)
    draws = run(target, 150, initial=torch.tensor([6.0, -6.0]))
    mean, covariance = target.posterior()
    assert bool(((draws.mean - mean).abs() < 5 * (covariance.diagonal() / draws.ess()).sqrt()).all())
    assert bool((draws.ess() > 30).all()) and draws.accept is not None and draws.accept.mean() > 0.6


@pytest.mark.parametrize("wrong", [ForgottenPrior, TemperedPrior, NoLikelihood])
def test_the_test_has_power(wrong: type[LinearGaussian]) -> None:
    with pytest.raises(AssertionError, match="outside"):
        assert_gaussian(independent(wrong(temperature=5.0)), *LinearGaussian(temperature=5.0).posterior())


def test_a_network_is_reached_and_evaluations_are_counted(generator: torch.Generator) -> None:
    log_joint, closed = linear_model(generator)
    draws = run(log_joint, 30, burn_in=60)
    error = (closed.posterior()[1].diagonal() / draws.ess().clamp(max=30)).sqrt()
    assert bool(((draws.mean - closed.posterior()[0]).abs() < 5 * error).all())
    torch.testing.assert_close(draws.log_joints, torch.stack([log_joint(row) for row in draws.draws]))
    assert draws.num_evaluations > 90 and draws.accept is not None and draws.accept.mean() > 0.5


def test_resumed_chains_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    whole = run(LinearGaussian(), 9, num_chains=2, burn_in=20)
    run(LinearGaussian(), 4, num_chains=2, burn_in=20, checkpoint=path)
    state = torch.get_rng_state()
    longer = run(LinearGaussian(), 9, seed=5, num_chains=2, burn_in=20, checkpoint=path, resume=True)
    assert torch.equal(torch.get_rng_state(), state)  # Pyro draws from torch's global generator
    assert torch.equal(longer.draws, whole.draws) and torch.equal(longer.log_joints, whole.log_joints)
    assert longer.num_evaluations > whole.num_evaluations - 1
    with pytest.raises(CheckpointError, match="warm_up was 20, now 30"):
        run(LinearGaussian(), 9, num_chains=2, burn_in=30, checkpoint=path, resume=True)


def test_refuses_bad_arguments_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"target_accept must be in \(0, 1\); got 1.0"):
        run(LinearGaussian(), 1, target_accept=1.0)
    with pytest.raises(ValueError, match="step_size must be positive and finite; got 0.0"):
        run(LinearGaussian(), 1, step_size=0.0)
    with pytest.raises(ValueError, match="burn_in must be at least 0; got -1"):
        run(LinearGaussian(), 1, burn_in=-1)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"nuts needs pyro; pip install 'lowrank-bdl\[experiments\]'"):
        run(LinearGaussian(), 1)
