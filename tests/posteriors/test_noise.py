"""Noise controls: their exact laws."""

import math

import pytest
import torch

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.noise import homoscedastic_noise, relative_noise
from tests.oracles import assert_close
from tests.posteriors.cases import network
from tests.statistical import assert_gaussian

WEIGHTS = torch.tensor([1.0, -2.0, 1e-3, 4.0], dtype=torch.float64)
EXPECTED = {
    "same": (lambda c: homoscedastic_noise(WEIGHTS, c), lambda c: torch.full((4,), c**2, dtype=torch.float64)),
    "relative": (lambda c: relative_noise(WEIGHTS, c), lambda c: (c * WEIGHTS).square()),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_draws_have_the_covariance_of_the_definition(kind):
    """False-alarm rate ALPHA; a level that is 10 % off in variance fails."""
    make, variance = EXPECTED[kind]
    posterior, covariance = make(0.3), torch.diag(variance(0.3))
    assert_close(posterior.covariance.to_dense(), covariance)
    assert_close(posterior.mean, WEIGHTS)
    draws = posterior.sample(8000, torch.Generator().manual_seed(0))
    assert_gaussian(draws, WEIGHTS, covariance)
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(draws, WEIGHTS, 1.1 * covariance)


def test_relative_noise_is_w_plus_c_times_w_times_normal():
    weights = torch.tensor([3.0, 0.0, -1.0])
    posterior = relative_noise(weights, 0.1)
    draws = posterior.sample(5, torch.Generator().manual_seed(0))
    assert torch.equal(draws[:, 1], torch.zeros(5)) and (draws[:, 0] != 3).all()
    assert posterior.log_prob(torch.tensor([3.0, 1e-3, -1.0])) == -math.inf
    expected = torch.distributions.Normal(torch.tensor([3.0, -1.0]).double(), torch.tensor([0.3, 0.1]).double())
    theta = torch.tensor([3.1, 0.0, -1.2])
    assert_close(posterior.log_prob(theta), expected.log_prob(theta[[0, 2]].double()).sum(), torch.float32, cond=10)


@pytest.mark.parametrize("make,name", [(homoscedastic_noise, "std"), (relative_noise, "fraction")])
def test_provenance_layout_and_refusals(make, name):
    layout = ParameterLayout.from_module(network())
    posterior = make(torch.ones(13), 0.25, layout)
    assert posterior.layout == layout and posterior.provenance[name] == 0.25
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be a positive number; got {bad}"):
            make(torch.ones(13), bad)
    with pytest.raises(NonFiniteError, match="must be finite; entry 2 is inf"):
        make(torch.tensor([0.0, 1.0, math.inf]), 0.1)
    with pytest.raises(ShapeError, match="layout has 13 coordinates"):
        make(torch.ones(3), 0.1, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_taken_as_float32(dtype):
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    same, relative = homoscedastic_noise(weights, 0.01), relative_noise(weights, 0.01)
    assert same.mean.dtype == relative.mean.dtype == torch.float32
    assert_close(same.stddev, torch.full((3,), 0.01).double(), torch.float32, 10)
    assert_close(relative.stddev, 0.01 * weights.double().abs(), torch.float32, 10)
