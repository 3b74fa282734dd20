"""Coordinate slice sampling against closed-form posteriors: full covariance, at the alarm rate of tests.statistical."""

from pathlib import Path

import pytest
import torch

from lowrank_bdl.subspaces.coordinate_slice import coordinate_slice
from tests.statistical import assert_gaussian
from tests.subspaces.targets import WRONG, LinearGaussian

CHAINS = 1500


def last_states(target: LinearGaussian, generator: torch.Generator, **options: float) -> torch.Tensor:
    settings = {"num_chains": CHAINS, "burn_in": 7, "initial": "prior", **options}
    return coordinate_slice(target, 1, generator=generator, **settings).flat  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"width": 0.2, "max_widths": 3}, {"width": 30.0}], ids=str)
def test_agrees_with_the_posterior(options: dict[str, float], generator: torch.Generator) -> None:
    """Whatever the width and the limit: they cost evaluations, or mixing, and never exactness."""
    target = LinearGaussian()
    mean, covariance = target.posterior()
    start = torch.randn(CHAINS, 2, dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(covariance).mT
    assert_gaussian(last_states(target, generator, initial=start + mean, burn_in=2, **options), mean, covariance)


def test_forgets_where_it_started(generator: torch.Generator) -> None:
    assert_gaussian(last_states(LinearGaussian(), generator), *LinearGaussian().posterior())


@pytest.mark.parametrize("mistake", WRONG)
def test_the_test_has_power(mistake: str, generator: torch.Generator) -> None:
    """The prior left out (as in drbayes), among others."""
    with pytest.raises(AssertionError, match="outside"):
        assert_gaussian(last_states(WRONG[mistake](), generator), *LinearGaussian().posterior())


def test_record_and_resume(tmp_path: Path) -> None:
    target = LinearGaussian()
    run = {"num_chains": 2, "burn_in": 2, "checkpoint": tmp_path / "chain"}
    whole = coordinate_slice(target, 9, num_chains=2, burn_in=2, generator=torch.Generator().manual_seed(1))
    coordinate_slice(target, 4, generator=torch.Generator().manual_seed(1), **run)  # type: ignore[arg-type]
    longer = coordinate_slice(target, 9, generator=torch.Generator().manual_seed(2), resume=True, **run)  # type: ignore[arg-type]
    assert torch.equal(longer.draws, whole.draws) and torch.equal(longer.log_joints, whole.log_joints)
    expected = target.log_likelihood(whole.draws) + target.log_prior(whole.draws)
    torch.testing.assert_close(whole.log_joints, expected, rtol=1e-12, atol=1e-12)
    assert whole.accept is not None and bool((whole.accept <= 1).all())


def test_refuses_bad_widths() -> None:
    with pytest.raises(ValueError, match="width must be positive and finite; got 0"):
        coordinate_slice(LinearGaussian(), 1, width=0.0)
    with pytest.raises(ValueError, match="max_widths must be at least 1; got 0"):
        coordinate_slice(LinearGaussian(), 1, max_widths=0)
