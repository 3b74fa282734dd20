"""MixturePosterior: MultiSWAG's density against a dense float64 mixture, its draws component by component."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from lowrank_bdl.errors import ShapeError, StaleError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.empirical import EmpiricalPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.mixture import MixturePosterior
from lowrank_bdl.posteriors.swag import SWAG
from tests.oracles import assert_close
from tests.posteriors.cases import block_diagonal, feed, iterates, network, swag_posterior
from tests.statistical import ALPHA, assert_gaussian

F64 = torch.float64
WEIGHTS = (0.5, 0.3, 0.2)


def multiswag(weights=None, dtype=F64, apart=0.0, blockwise=False):
    """Three SWAG posteriors of different ranks, their mixture, and the dense mixture of all of them."""
    runs = [
        swag_posterior(seed=m, scale=0.5 + 0.2 * m, count=10 + m, rank=3 + m, dtype=dtype, shift=apart * m)
        for m in range(3)
    ]
    posteriors = [BlockPosterior.from_joint(run[0]) if blockwise else run[0] for run in runs]
    covariances = [block_diagonal(run[2], run[0].layout) if blockwise else run[2] for run in runs]
    normals = [torch.distributions.MultivariateNormal(run[1], c) for run, c in zip(runs, covariances, strict=True)]
    return MixturePosterior(posteriors, weights), normals


def dense_log_prob(normals, weights, thetas):
    """Log-density of the mixture from its definition, in float64."""
    shares = torch.tensor(weights or [1.0] * len(normals), dtype=F64)
    shares = shares / shares.sum()
    return torch.stack([w.log() + n.log_prob(thetas.double()) for w, n in zip(shares, normals, strict=True)]).logsumexp(
        0
    )


def dense_moments(normals, weights):
    """Mean and standard deviations of the mixture from first and second moments."""
    mean = sum(w * n.mean for w, n in zip(weights, normals, strict=True))
    second = sum(w * (n.variance + n.mean.square()) for w, n in zip(weights, normals, strict=True))
    return mean, (second - mean.square()).sqrt()


# ---- density --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("weights", [None, WEIGHTS, (3, 1, 0)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_multiswag_log_density_is_that_of_the_dense_mixture(weights, dtype, blockwise):
    """At draws of every component and far away from all, where every density underflows."""
    mixture, normals = multiswag(weights, dtype, blockwise=blockwise)
    near = torch.cat([c.sample(4, torch.Generator().manual_seed(m)) for m, c in enumerate(mixture.components)])
    thetas = torch.cat([near, near[:3] + 50]).view(3, 5, 13)
    expected = dense_log_prob(normals, weights, thetas)
    found = mixture.log_prob(thetas)
    assert found.dtype == F64 and found.shape == (3, 5) and (expected < -1e4).any()
    cond = max(torch.linalg.cond(n.covariance_matrix).item() for n in normals)
    assert_close(found, expected, dtype, cond=cond)
    assert_close(mixture.log_prob(thetas[0, 0]), expected[0, 0], dtype, cond=cond)


def test_log_density_where_components_overlap():
    """Two identical components are one; a density that ignored the weights or took the nearest would not be."""
    posterior, mean, covariance = swag_posterior()
    mixture = MixturePosterior([posterior, posterior], [0.2, 0.8])
    thetas = posterior.sample(5, torch.Generator().manual_seed(0))
    assert_close(
        mixture.log_prob(thetas), torch.distributions.MultivariateNormal(mean, covariance).log_prob(thetas), cond=1e3
    )
    assert_close(mixture.stddev, covariance.diagonal().sqrt())


def test_mixture_of_mixtures_is_taken_apart():
    one, normals = multiswag(WEIGHTS)
    other, mean, covariance = swag_posterior(seed=7)
    nested = MixturePosterior([one, other], [3, 1])
    shares = [0.375, 0.225, 0.15, 0.25]
    assert len(nested.components) == 4 and nested.weights.tolist() == pytest.approx(shares, rel=1e-15)
    everything = [*normals, torch.distributions.MultivariateNormal(mean, covariance)]
    thetas = nested.sample(6, torch.Generator().manual_seed(0))
    assert_close(nested.log_prob(thetas), dense_log_prob(everything, shares, thetas), cond=1e3)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_moments_are_those_of_the_dense_mixture(weights, dtype):
    mixture, normals = multiswag(weights, dtype, apart=0.3)
    mean, stddev = dense_moments(normals, weights or (1 / 3, 1 / 3, 1 / 3))
    assert mixture.mean.dtype == mixture.stddev.dtype == dtype
    assert_close(mixture.mean, mean, dtype)
    assert_close(mixture.stddev, stddev, dtype, cond=10)


def test_stddev_does_not_cancel():
    """Standard deviations of 1e-4 around weights of 1 in float32, which E[w^2] - E[w]^2 loses."""
    left, right = (GaussianPosterior.diagonal(torch.full((9,), m), torch.full((9,), 1e-8)) for m in (1.0, 1.0001))
    expected = torch.full((9,), (1e-8 + ((1.0001 - 1.0) / 2) ** 2) ** 0.5, dtype=F64)
    assert_close(MixturePosterior([left, right]).stddev, expected, torch.float32, cond=300)  # 1.0001 is rounded


def test_point_masses_in_different_components():
    """A weight that never moved in one run only: on its value that run has all the probability, off it none."""
    still, moving = torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 4.0]).double()
    zero = torch.zeros(2).double()
    mixture = MixturePosterior([GaussianPosterior.diagonal(zero, v) for v in (still, moving)], [0.25, 0.75])
    unit, wide = torch.distributions.Normal(zero[0], 1.0), torch.distributions.Normal(zero[0], 2.0)
    x = torch.tensor([0.3, 0.0]).double()
    assert_close(mixture.log_prob(x), math.log(0.25) + unit.log_prob(x[0]))
    x[1] = 0.5
    assert_close(mixture.log_prob(x), math.log(0.75) + unit.log_prob(x[0]) + wide.log_prob(x[1]))
    same = MixturePosterior([GaussianPosterior.diagonal(zero + m, still) for m in (0.0, 1.0)])
    assert same.log_prob(x) == -math.inf
    x[1] = 1.0
    assert_close(same.log_prob(x), math.log(0.5) + unit.log_prob(x[0] - 1))


# ---- draws: false-alarm rate ALPHA per statistic --------------------------------------------------------------------


def components_of(draws, normals):
    """Which component each draw came from: exact, since their means are far apart."""
    distances = torch.stack([(draws.double() - n.mean).norm(dim=1) for n in normals])
    return distances.argmin(0)


@pytest.mark.parametrize("weights", [WEIGHTS, None])
def test_draws_have_the_law_of_each_component_and_its_share(weights):
    mixture, normals = multiswag(weights, apart=50.0)
    draws = mixture.sample(9000, torch.Generator().manual_seed(0))
    chosen = components_of(draws, normals)
    counts = torch.bincount(chosen, minlength=3).numpy()
    shares = mixture.weights.numpy()
    assert chisquare(counts, 9000 * shares).pvalue > ALPHA
    for m, normal in enumerate(normals):
        assert_gaussian(draws[chosen == m], normal.mean, normal.covariance_matrix)
        with pytest.raises(AssertionError, match="covariance: .* outside"):  # power: 20 % in variance
            assert_gaussian(draws[chosen == m], normal.mean, 1.2 * normal.covariance_matrix)
    assert chisquare(counts, 9000 * torch.tensor([0.4, 0.35, 0.25], dtype=F64).numpy()).pvalue < ALPHA  # power
    assert (chosen[1:] != chosen[:-1]).float().mean() > 0.5  # in random order, not one component after the other


def test_stratified_draws_are_those_of_their_component():
    whole, every = multiswag(WEIGHTS, apart=50.0)
    mixture = whole.marginal("2.weight")
    normals = [torch.distributions.MultivariateNormal(n.mean[9:12], n.covariance_matrix[9:12, 9:12]) for n in every]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([mixture.draw(s, generator) for s in range(2000)])
    chosen = components_of(draws, normals)
    assert chosen.tolist() == [mixture.component_of(s) for s in range(2000)]
    assert torch.bincount(chosen).tolist() == [1000, 600, 400]
    for m, normal in enumerate(normals):
        assert_gaussian(draws[chosen == m], normal.mean, normal.covariance_matrix)
    one = mixture.draw(4, torch.Generator().manual_seed(9))
    again = mixture.components[mixture.component_of(4)].sample(1, torch.Generator().manual_seed(9))[0]
    assert one.shape == (3,) and torch.equal(one, again)


def diagonals(count):
    return [GaussianPosterior.diagonal(torch.zeros(1), torch.ones(1)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_weights_take_turns(count):
    mixture = MixturePosterior(diagonals(count))
    order = [mixture.component_of(s) for s in range(20 * count)]
    assert all(sorted(order[i : i + count]) == list(range(count)) for i in range(0, len(order), count))
    assert order[:count] == list(range(count))
    assert mixture.component_of(5 * count) == MixturePosterior(diagonals(count)).component_of(5 * count)


@pytest.mark.parametrize("weights", [(5, 3, 2), (1, 0, 9), (0.7, 0.1, 0.1, 0.1), (1 / 3, 2 / 3)])
def test_every_component_has_its_share_of_the_first_draws(weights):
    mixture = MixturePosterior(diagonals(len(weights)), weights)
    counts = torch.zeros(len(weights), dtype=F64)
    for s in range(300):
        counts[mixture.component_of(s)] += 1
        assert ((counts - (s + 1) * mixture.weights).abs() < 1 + 1e-9).all()
    assert counts[mixture.weights == 0].sum() == 0


@pytest.mark.parametrize("n,shape", [(0, (0, 13)), (4, (4, 13)), (torch.Size(), (13,)), ((2, 3), (2, 3, 13))])
def test_sample_shapes_and_generators(n, shape):
    mixture, _ = multiswag()
    state = torch.get_rng_state()
    one, same = (mixture.sample(n, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.shape == shape and torch.equal(one, same)
    mixture.draw(2, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="number of draws must be >= 0; got -1"):
        mixture.sample(-1)
    with pytest.raises(ValueError, match="number of a draw must be >= 0; got -2"):
        mixture.draw(-2)


# ---- derived posteriors and refusals --------------------------------------------------------------------------------


def test_marginal_and_to():
    mixture, normals = multiswag(WEIGHTS)
    marginal = mixture.marginal("2")
    parts = [torch.distributions.MultivariateNormal(n.mean[9:], n.covariance_matrix[9:, 9:]) for n in normals]
    theta = marginal.sample(3, torch.Generator().manual_seed(0))
    assert marginal.layout.names == ("2.weight", "2.bias")
    assert_close(marginal.log_prob(theta), dense_log_prob(parts, WEIGHTS, theta), cond=1e3)
    narrow = mixture.to(torch.float32)
    assert narrow.mean.dtype == torch.float32 and torch.equal(narrow.weights, mixture.weights)
    blocks, _ = multiswag(blockwise=True)
    with pytest.raises(TypeError, match=r"component 0 is a BlockPosterior, which has no marginal\(\)"):
        blocks.marginal("2")


def test_stale_with_its_components():
    model = network()
    swag = feed(SWAG(model, 3), model, iterates(5))
    mixture = MixturePosterior([swag.posterior(), swag.posterior(copy=True)])
    swag.update_parameters(model)
    for use in (lambda: mixture.log_prob(torch.zeros(13)), lambda: mixture.draw(0), lambda: mixture.mean):
        with pytest.raises(StaleError, match="collector was updated"):
            use()
    assert mixture.draw(1).shape == (13,)  # that component owns its deviations


def test_refusals():
    posterior, _, _ = swag_posterior()
    with pytest.raises(ShapeError, match="at least 1 component; got none"):
        MixturePosterior([])
    with pytest.raises(TypeError, match="component 1 is of class EmpiricalPosterior, which lacks log_prob"):
        MixturePosterior([posterior, EmpiricalPosterior(torch.zeros(2, 13))])
    with pytest.raises(TypeError, match="one dtype and device; got torch.float32 on cpu, torch.float64 on cpu"):
        MixturePosterior([posterior, posterior.to(torch.float32)])
    with pytest.raises(ShapeError, match=r"one length D; got \[1, 13\]"):
        MixturePosterior([GaussianPosterior.diagonal(torch.zeros(1).double(), torch.ones(1).double()), posterior])
    other = ParameterLayout.from_module(nn.Linear(12, 1))
    foreign = GaussianPosterior(
        torch.zeros(13).double(), LowRankPlusDiagLinearOperator(torch.ones(13, 1), torch.ones(13).double()), other
    )
    with pytest.raises(ShapeError, match="component 1 is over other parameters than component 0: parameter number 0"):
        MixturePosterior([posterior, foreign])
    assert MixturePosterior([GaussianPosterior(foreign.mean, foreign.covariance), posterior]).layout == posterior.layout
    for weights, message in (
        ((1.0,), "one for each of 2 components; got 1"),
        ((1.0, -1.0), "weights must be >= 0, finite and not all zero"),
        ((0.0, 0.0), "not all zero"),
        ((1.0, float("nan")), "finite"),
        ((1.0, float("inf")), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            MixturePosterior([posterior, posterior], weights)
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 13\)"):
        MixturePosterior([posterior]).log_prob(torch.zeros(12))
    assert repr(MixturePosterior([posterior])) == "MixturePosterior(numel=13, components=1)"
