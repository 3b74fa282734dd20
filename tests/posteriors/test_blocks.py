"""BlockPosterior: one law in draws, density, entropy, KL and covariance; block-wise SWAG shares and goes stale."""

import math

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import ShapeError, StaleError
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior, kl_divergence
from lowrank_bdl.posteriors.swag import SWAG
from tests.oracles import assert_close
from tests.posteriors.cases import block_diagonal, dense_swag, feed, iterates, network, swag_posterior
from tests.statistical import assert_gaussian

F64 = torch.float64
N = 4000
NARROW = [torch.bfloat16, torch.float16, torch.int8]


def blockwise(scale=0.5, dtype=F64, count=12, **options):
    """Block-wise SWAG, its mean, and its dense covariance from the definition."""
    joint, mean, covariance = swag_posterior(scale=scale, dtype=dtype, count=count, **options)
    return BlockPosterior.from_joint(joint), mean, block_diagonal(covariance, joint.layout)


def plain(dtype=F64, size=1.0):
    """Blocks of 3, 1 and 2 coordinates without a layout, one of them diagonal."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=F64).to(dtype)  # noqa: E731
    first = LowRankPlusDiagLinearOperator(draw(3, 2), draw(3).square() + 0.5, size)
    blocks = [
        GaussianPosterior(draw(3), first),
        GaussianPosterior.diagonal(draw(1), torch.tensor([0.3], dtype=dtype)),
        GaussianPosterior(draw(2), LowRankPlusDiagLinearOperator(draw(2, 1), draw(2).square() + 0.5)),
    ]
    posterior = BlockPosterior(blocks, provenance={"source": "test"})
    covariance = torch.block_diag(*(block.covariance.to_dense().double() for block in blocks))
    return posterior, torch.cat([block.mean for block in blocks]).double(), covariance


# ---- the sampler: full covariance, false-alarm rate ALPHA per test --------------------------------------------------


@pytest.mark.parametrize("count,rank", [(12, 5), (3, 5), (12, 0), (2, 1)])
def test_blockwise_swag_draws_have_the_block_diagonal_covariance(count, rank):
    posterior, mean, covariance = blockwise(count=count, rank=rank)
    assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(1)), mean, covariance)


@pytest.mark.parametrize("stored", [None, *NARROW], ids=str)
def test_draws_in_float32(stored):
    """The stored deviations are rounded; the law is that of what is stored."""
    posterior, mean, covariance = blockwise(dtype=torch.float32, deviation_dtype=stored)
    if stored is not None:
        joint = swag_posterior(dtype=torch.float32, deviation_dtype=stored)[0]
        covariance = block_diagonal(joint.covariance.to_dense().double(), joint.layout)
    assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(2)), mean, covariance)


def test_draws_of_given_blocks():
    posterior, mean, covariance = plain()
    assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(3)), mean, covariance)


def test_power_wrong_scale_and_shared_low_rank_noise():
    posterior, mean, covariance = blockwise(scale=0.55)
    expected = covariance / 1.1
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(1)), mean, expected)
    joint, _, _ = swag_posterior()
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(joint.sample(N, torch.Generator().manual_seed(1)), mean, expected)


def test_power_scale_that_multiplies_the_standard_deviation():
    """What the released code's block-wise sampler does with the same number."""
    _, mean, covariance = blockwise(scale=0.5)
    wrong, _, _ = blockwise(scale=0.5**2)
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(wrong.sample(N, torch.Generator().manual_seed(1)), mean, covariance)


@pytest.mark.parametrize("n,shape", [(0, (0, 13)), (3, (3, 13)), (torch.Size(), (13,)), ((2, 3), (2, 3, 13))])
def test_sample_shapes(n, shape):
    assert blockwise()[0].sample(n).shape == shape


def test_draws_come_from_the_generator():
    posterior, _, _ = blockwise()
    state = torch.get_rng_state()
    one, same, other = (posterior.sample(3, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


# ---- moments and densities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [blockwise, plain])
def test_moments_log_prob_and_entropy(make):
    posterior, mean, covariance = make()
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    cond = torch.linalg.cond(covariance).item()
    thetas = mean + torch.randn(2, 3, len(mean), generator=torch.Generator().manual_seed(4), dtype=F64)
    assert_close(posterior.mean, mean)
    assert_close(posterior.stddev, covariance.diagonal().sqrt())
    assert_close(posterior.covariance.to_dense(), covariance)
    assert isinstance(posterior.covariance, BlockDiagonalLinearOperator)
    assert_close(posterior.log_prob(thetas), normal.log_prob(thetas), cond=cond)
    assert_close(posterior.log_prob(thetas[0, 0]), normal.log_prob(thetas[0, 0]), cond=cond)
    assert_close(posterior.entropy(), normal.entropy(), cond=cond)


@pytest.mark.parametrize("stored", NARROW, ids=str)
def test_narrow_deviations_are_decoded_and_not_kept(stored):
    joint, _, _ = swag_posterior(dtype=torch.float32, deviation_dtype=stored)
    posterior = BlockPosterior.from_joint(joint)
    expected = block_diagonal(joint.covariance.to_dense().double(), joint.layout)
    normal = torch.distributions.MultivariateNormal(joint.mean.double(), expected)
    theta = joint.mean + 0.05
    assert_close(posterior.covariance.to_dense(), expected, torch.float32)
    assert_close(posterior.stddev, expected.diagonal().sqrt(), torch.float32)
    assert_close(posterior.log_prob(theta), normal.log_prob(theta.double()), torch.float32, cond=100)
    assert (posterior.blocks[0] is posterior.blocks[0]) == (stored is torch.bfloat16)  # bfloat16 needs no scales


def test_point_masses():
    thetas = iterates(9)
    thetas[:, 4] = 0.25
    model = network()
    posterior = feed(SWAG(model, 5), model, thetas).posterior(blockwise=True)
    free = torch.arange(13) != 4
    mean, covariance = dense_swag(thetas, 5)
    covariance = block_diagonal(covariance, posterior.layout)[free][:, free]
    expected = torch.distributions.MultivariateNormal(mean[free], covariance)
    theta = iterates(1, seed=2)[0]
    theta[4] = 0.25
    assert_close(posterior.log_prob(theta), expected.log_prob(theta.double()[free]), torch.float32, cond=100)
    assert_close(posterior.entropy(), expected.entropy(), torch.float32, cond=100)
    theta[4] = 0.3
    assert posterior.log_prob(theta) == -math.inf


def test_a_block_that_is_fixed():
    """Parameters left at the mean: all of a block is a point mass."""
    fixed = GaussianPosterior.diagonal(torch.ones(2), torch.zeros(2))
    posterior = BlockPosterior([GaussianPosterior.diagonal(torch.zeros(1), torch.ones(1)), fixed])
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    assert torch.equal(posterior.sample(4)[:, 1:], torch.ones(4, 2))
    assert_close(posterior.log_prob(torch.tensor([0.5, 1.0, 1.0])), normal.log_prob(torch.tensor(0.5, dtype=F64)))
    assert_close(posterior.entropy(), normal.entropy())
    assert posterior.log_prob(torch.tensor([0.5, 1.0, 2.0])) == -math.inf


def test_kl_is_that_of_the_dense_block_diagonal_gaussians():
    (p, p_mean, p_cov), (q, q_mean, q_cov) = blockwise(), blockwise(scale=2.0, count=8, rank=3)
    normals = (torch.distributions.MultivariateNormal(m, c) for m, c in ((p_mean, p_cov), (q_mean, q_cov)))
    expected = torch.distributions.kl_divergence(*normals)
    assert_close(kl_divergence(p, q), expected, cond=torch.linalg.cond(q_cov).item())
    assert kl_divergence(p, p).abs() < 1e-6
    with pytest.raises(TypeError, match="got BlockPosterior and GaussianPosterior"):
        kl_divergence(p, swag_posterior()[0])
    with pytest.raises(TypeError, match="got GaussianPosterior and BlockPosterior"):
        kl_divergence(swag_posterior()[0], p)
    with pytest.raises(TypeError, match="needs two GaussianPosteriors, BlockPosteriors or Multi.*; got int and"):
        kl_divergence(1, p)
    joint = swag_posterior()[0]
    with pytest.raises(ShapeError, match=r"blocks of the same sizes; got \[6, 3, 3, 1\] and \[9, 4\]"):
        kl_divergence(p, BlockPosterior.from_joint(joint, [9, 4]))
    other = BlockPosterior.from_joint(GaussianPosterior(joint.mean, joint.covariance, layout_of(nn.Linear(12, 1))))
    with pytest.raises(ShapeError, match="over different parameters: parameter number 0: expected '0.weight'"):
        kl_divergence(p, other)


def layout_of(model):
    return ParameterLayout.from_module(model)


# ---- sharing --------------------------------------------------------------------------------------------------------

USES = {
    "sample": lambda p: p.sample(2),
    "log_prob": lambda p: p.log_prob(torch.zeros(13)),
    "entropy": lambda p: p.entropy(),
    "mean": lambda p: p.mean,
    "stddev": lambda p: p.stddev,
    "covariance": lambda p: p.covariance,
    "block": lambda p: p.blocks[0].mean,
    "to": lambda p: p.to(F64),
    "save": lambda p: p.save("never-written.safetensors"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("rank,stored", [(None, None), (2, None), (0, None), (None, torch.float16)])
def test_blockwise_posterior_is_stale_after_an_update(use, used_before, rank, stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network()
    swag = feed(SWAG(model, 5, deviation_dtype=stored), model, iterates(8))
    posterior = swag.posterior(rank=rank, blockwise=True)
    if used_before:
        USES[use](posterior)
        (tmp_path / "never-written.safetensors").unlink(missing_ok=True)
    swag.update_parameters(model)
    with pytest.raises(StaleError, match=r"collector was updated.*copy=True"):
        USES[use](posterior)
    assert list(tmp_path.iterdir()) == []


def test_copied_blockwise_posterior_stays_as_it_was():
    model = network()
    swag = feed(SWAG(model, 5), model, iterates(8))
    shared = swag.posterior(blockwise=True).covariance.to_dense()
    posterior = swag.posterior(copy=True, blockwise=True)
    swag.update_parameters(model)
    assert torch.equal(posterior.covariance.to_dense(), shared)


def test_blocks_are_views_of_the_collectors_deviations():
    model = network()
    swag = feed(SWAG(model, 5), model, iterates(9))
    posterior = swag.posterior(scale=0.7, blockwise=True)
    assert [block.mean.numel() for block in posterior.blocks] == [6, 3, 3, 1]
    for block, where in zip(posterior.blocks, posterior.slices, strict=True):
        root = block.covariance.root
        assert root.untyped_storage().data_ptr() == swag.storage.untyped_storage().data_ptr()
        assert root.storage_offset() == where.start and root.stride() == (1, 13)
    assert posterior.layout == swag.layout
    assert posterior.provenance == {**swag.posterior(scale=0.7).provenance, "blocks": 4}


def test_parameters_without_entries_make_no_block():
    model = nn.ParameterDict({"a": torch.zeros(2), "none": torch.zeros(0), "b": torch.zeros(3)})
    swag = SWAG(model, 2)
    for value in (0.0, 1.0, 3.0):
        with torch.no_grad():
            model["a"].fill_(value)
            model["b"].fill_(-value)
        swag.update_parameters(model)
    posterior = swag.posterior(blockwise=True)
    assert len(posterior.blocks) == 2 and posterior.sample(2).shape == (2, 5)


# ---- conversions and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [blockwise, plain])
def test_to_changes_dtype_of_every_result(make):
    posterior, _, covariance = make(dtype=torch.float32)
    wide = posterior.to(F64)
    assert wide.mean.dtype == wide.sample(1).dtype == wide.covariance.dtype == F64
    assert posterior.mean.dtype == torch.float32
    assert_close(wide.covariance.to_dense(), covariance, torch.float32)
    assert wide.layout == posterior.layout and wide.provenance == posterior.provenance


def test_refusals():
    block = GaussianPosterior.diagonal(torch.zeros(2), torch.ones(2))
    with pytest.raises(ShapeError, match="at least 1 block; got none"):
        BlockPosterior([])
    with pytest.raises(TypeError, match="block 1 is of class Linear, which lacks mean, stddev, sample, log_prob, cov"):
        BlockPosterior([block, nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="one dtype and device; got torch.float32 on cpu, torch.float64 on cpu"):
        BlockPosterior([block, block.to(F64)])
    with pytest.raises(ShapeError, match="layout has 13 coordinates; the blocks have 2"):
        BlockPosterior([block], layout_of(network()))
    joint, _, _ = swag_posterior()
    with pytest.raises(ShapeError, match=r"sizes must be positive and sum to 13; got \[6, 6\]"):
        BlockPosterior.from_joint(joint, [6, 6])
    with pytest.raises(ShapeError, match=r"sum to 13; got \[13, 0\]"):
        BlockPosterior.from_joint(joint, [13, 0])
    with pytest.raises(ShapeError, match="need a layout; this posterior has none: give sizes"):
        BlockPosterior.from_joint(GaussianPosterior(joint.mean, joint.covariance))
    posterior, _, _ = plain()
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 6\); got \(2, 5\)"):
        posterior.log_prob(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="number of draws must be >= 0; got -1"):
        posterior.sample(-1)
    assert repr(posterior) == "BlockPosterior(numel=6, blocks=3)"
