"""EmpiricalPosterior: members, draws with replacement, moments."""

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.empirical import EmpiricalPosterior
from tests.oracles import assert_close
from tests.posteriors.cases import iterates, network
from tests.statistical import ALPHA


def ensemble(count=7, dtype=torch.float64):
    thetas = iterates(count, dtype=dtype)
    return EmpiricalPosterior(thetas, ParameterLayout.from_module(network()), {"source": "test"}), thetas


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 7])
def test_moments_are_those_of_the_uniform_distribution_over_members(count, dtype):
    posterior, thetas = ensemble(count, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert posterior.mean.dtype == posterior.stddev.dtype == wide
    assert_close(posterior.mean, thetas.double().mean(0), wide)
    assert_close(posterior.stddev, thetas.double().var(0, correction=0).sqrt(), wide, cond=10)


def test_stddev_of_large_weights_does_not_cancel():
    thetas = (1 + 1e-4 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).float()
    expected = thetas.double().std(0, correction=0)
    assert ((EmpiricalPosterior(thetas).stddev - expected).abs() / expected).max() < 1e-3


def test_moments_over_more_columns_than_a_chunk():
    thetas = torch.randn(3, 300_001, generator=torch.Generator().manual_seed(0))
    posterior = EmpiricalPosterior(thetas)
    assert_close(posterior.mean, thetas.double().mean(0), torch.float32)
    assert_close(posterior.stddev, thetas.double().std(0, correction=0), torch.float32)


@pytest.mark.parametrize("count", [1, 2, 6, 7, 30])
def test_members_are_evenly_spaced_and_end_with_the_newest(count):
    thetas = torch.arange(float(count))[:, None]
    posterior = EmpiricalPosterior(thetas)
    assert posterior.num_members == count and posterior.members() is thetas
    for num in range(1, count + 1):
        chosen = posterior.members(num)[:, 0].long()
        gaps = chosen.diff(prepend=torch.tensor([-1]))
        assert chosen[-1] == count - 1 and len(chosen) == num
        assert gaps.min() >= count // num and gaps.max() <= -(-count // num)
    assert torch.equal(posterior.members(count), thetas)


def test_members_share_memory_where_they_can():
    posterior, thetas = ensemble(6)
    assert posterior.thetas is thetas
    assert posterior.members(3).untyped_storage().data_ptr() == thetas.untyped_storage().data_ptr()
    assert posterior.marginal("2").thetas.untyped_storage().data_ptr() == thetas.untyped_storage().data_ptr()


def which(posterior, draws):
    same = (draws[:, None] == posterior.thetas).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def test_draws_are_members_with_equal_chances():
    """False-alarm rate ALPHA; a sampler that favours a member by a fifth fails."""
    posterior, _ = ensemble()
    generator = torch.Generator().manual_seed(0)
    chosen = which(posterior, posterior.sample(7000, generator))
    counts = torch.bincount(chosen, minlength=7)
    assert chisquare(counts.numpy()).pvalue > ALPHA
    biased = torch.tensor([1.2, *[5.8 / 6] * 6], dtype=torch.float64)
    assert chisquare(counts.numpy(), (1000 * biased).numpy()).pvalue < ALPHA
    pairs = torch.bincount(7 * chosen[0::2] + chosen[1::2], minlength=49)  # independent, with replacement
    assert chisquare(pairs.numpy()).pvalue > ALPHA


@pytest.mark.parametrize("n,shape", [(0, (0, 13)), (4, (4, 13)), (torch.Size(), (13,)), ((2, 3), (2, 3, 13))])
def test_sample_shapes_and_generators(n, shape):
    posterior, _ = ensemble()
    state = torch.get_rng_state()
    one, same = (posterior.sample(n, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == shape and torch.equal(one, same)
    assert torch.equal(state, torch.get_rng_state())


def test_from_models():
    models = [network() for _ in range(3)]
    layout = ParameterLayout.from_module(models[0])
    for model, theta in zip(models, iterates(3), strict=True):
        layout.assign_(model, theta)
    posterior = EmpiricalPosterior.from_models(models)
    assert torch.equal(posterior.thetas, iterates(3)) and posterior.layout == layout
    part = EmpiricalPosterior.from_models(iter(models), include="2", exclude="*.bias")
    assert torch.equal(part.thetas, iterates(3)[:, 9:12]) and part.layout.names == ("2.weight",)
    with pytest.raises(ShapeError, match="at least 1 network; got none"):
        EmpiricalPosterior.from_models([])
    with pytest.raises(ShapeError, match=r"'0.weight': expected shape \(3, 2\)"):
        EmpiricalPosterior.from_models([models[0], nn.Sequential(nn.Linear(5, 2))])
    nn.init.constant_(models[1][0].bias, float("nan"))
    with pytest.raises(NonFiniteError, match="parameter '0.bias' has nan at flat index 0"):
        EmpiricalPosterior.from_models(models)


def test_marginal_and_to():
    posterior, thetas = ensemble()
    part = posterior.marginal("*.bias")
    assert torch.equal(part.thetas, thetas[:, [6, 7, 8, 12]]) and part.layout.names == ("0.bias", "2.bias")
    narrow = posterior.to(torch.float32)
    assert narrow.thetas.dtype == torch.float32 and narrow.provenance == {"source": "test"}
    with pytest.raises(ShapeError, match="needs a layout; this posterior has none"):
        EmpiricalPosterior(thetas).marginal("0")


def test_refusals():
    for thetas in (torch.zeros(13), torch.zeros(0, 13), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"of shape \(M, D\) with M >= 1; got \("):
            EmpiricalPosterior(thetas)
    with pytest.raises(ShapeError, match="layout has 13 coordinates; thetas have 3"):
        EmpiricalPosterior(torch.zeros(2, 3), ParameterLayout.from_module(network()))
    bad = torch.zeros(3, 4)
    bad[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="thetas must be finite; entry 1 of vector 2 is nan"):
        EmpiricalPosterior(bad)
    posterior, _ = ensemble()
    for num in (0, 8, -1):
        with pytest.raises(ValueError, match=f"number of members must be between 1 and 7; got {num}"):
            posterior.members(num)
    assert repr(posterior) == "EmpiricalPosterior(num_members=7, numel=13, dtype=torch.float64)"
