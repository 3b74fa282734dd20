"""The Gaussian of one layer against a dense one, and its file."""

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.distributions import kl_divergence as dense_divergence

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior, kl_divergence
from lowrank_bdl.posteriors.laplace_block import KroneckerGaussian
from lowrank_bdl.posteriors.storage import load_posterior
from tests.oracles import assert_close
from tests.statistical import assert_chi_square, assert_gaussian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def block(seed=0, dtype=torch.float64, has_bias=True):
    left, right = (torch.linalg.qr(randn(2, size, size, seed=seed + size))[0] for size in (2, 3))
    covariance = KroneckerSpectralLinearOperator(left, right, randn(2, 2, 3, seed=seed).exp(), has_bias, dtype)
    return KroneckerGaussian(randn(12, seed=seed + 9).to(dtype), covariance)


def dense(gaussian):
    return MultivariateNormal(gaussian.mean.double(), gaussian.covariance.to(torch.float64).to_dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_density_entropy_deviation_and_divergence(dtype):
    ours, other = block(dtype=dtype), block(seed=3, dtype=dtype)
    theta = randn(4, 5, 12, seed=1).to(dtype)
    for values in (theta, theta[0, 0]):
        assert_close(ours.log_prob(values), dense(ours).log_prob(values.double()), cond=100)
    assert ours.log_prob(theta).dtype == torch.float64
    assert ours.log_prob(theta[:0]).shape == (0, 5) and block(has_bias=False).log_prob(theta[:0, 0]).shape == (0,)
    assert_close(ours.entropy(), dense(ours).entropy(), cond=10)
    assert_close(ours.stddev, dense(ours).stddev, dtype, 10)
    assert_close(kl_divergence(ours, other), dense_divergence(dense(ours), dense(other)), cond=100)
    assert kl_divergence(ours, ours) == 0


def test_draws():
    """Full covariance and coverage; fails twice in 1e6 for a correct sampler, always for one sqrt(2) too wide."""
    gaussian, law = block(dtype=torch.float32), dense(block(dtype=torch.float32))
    draws = gaussian.sample(2000, generator())
    assert_gaussian(draws, law.mean, law.covariance_matrix)
    squares = gaussian.covariance.inv_quad((draws - gaussian.mean).mT, reduce_inv_quad=False)
    assert_chi_square(squares, 12)
    with pytest.raises(AssertionError, match="covariance"):
        assert_gaussian((draws - gaussian.mean) * 2**0.5 + gaussian.mean, law.mean, law.covariance_matrix)
    assert gaussian.sample(torch.Size(), generator()).shape == (12,)
    assert gaussian.sample((2, 3), generator()).shape == (2, 3, 12)
    assert torch.equal(gaussian.sample(3, generator()), gaussian.sample(3, generator()))


def test_density_is_that_of_the_draws_where_the_eigenvalues_differ_by_twelve_orders():
    """Variances of 1 and 1e-12 in one layer: the density of a float64 draw is right, and so is the log-determinant."""
    left, right = (torch.linalg.qr(randn(1, 3, 3, seed=seed))[0] for seed in (1, 2))
    values = torch.logspace(-12, 0, 9, dtype=torch.float64).view(1, 3, 3)
    gaussian = KroneckerGaussian(torch.zeros(9).double(), KroneckerSpectralLinearOperator(left, right, values))
    wide = gaussian.to(torch.float64)
    squares = wide.covariance.inv_quad(wide.sample(2000, generator()).mT, reduce_inv_quad=False)
    assert_chi_square(squares, 9)
    assert wide.covariance.logdet().item() == pytest.approx(values.log().sum().item(), rel=1e-14)


def test_moves_between_dtypes():
    gaussian = block()
    assert gaussian.to(torch.float32).mean.dtype == gaussian.to(torch.float32).sample(1).dtype == torch.float32
    assert repr(gaussian) == "KroneckerGaussian(numel=12, factors=2 x (2, 3))"


def test_files(tmp_path):
    gaussian = block(dtype=torch.float32)
    gaussian.save(tmp_path / "block.safetensors")
    loaded = load_posterior(tmp_path / "block.safetensors")
    assert isinstance(loaded, KroneckerGaussian)
    assert torch.equal(loaded.sample(3, generator()), gaussian.sample(3, generator()))
    assert loaded.covariance.has_bias and loaded.covariance.dtype == torch.float32
    whole = BlockPosterior([gaussian, GaussianPosterior.diagonal(torch.zeros(2), torch.tensor([1.0, 0.0]))])
    whole.save(tmp_path / "whole.safetensors")
    theta = whole.sample(3, generator())
    assert torch.equal(load_posterior(tmp_path / "whole.safetensors").log_prob(theta), whole.log_prob(theta))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("eigenvalues", torch.zeros(2, 2, 3).double(), "contradicts itself: eigenvalues must be positive"),
        ("eigenvalues", torch.ones(2, 3, 2).double(), "contradicts itself: expected left_vectors"),
        (
            "left_vectors",
            torch.full((2, 2, 2), float("nan")).double(),
            "contradicts itself: eigenvectors must be finite",
        ),
        ("right_vectors", torch.zeros(2, 3, 3), "contradicts itself: eigenvectors and eigenvalues must be float64"),
        ("mean", torch.zeros(11), r"contradicts itself: mean must be \(d,\)"),
        ("mean", None, "lacks mean"),
        ("has_bias", 1, "has damaged metadata: has_bias must be true or false, got 1"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, key, value, message):
    path = tmp_path / "block.safetensors"
    block().save(path)
    tensors, metadata = read_tensors(path, KroneckerGaussian.kind, ())
    target = metadata if key == "has_bias" else tensors
    target[key] = value
    if value is None:
        del tensors[key]
    write_tensors(path, KroneckerGaussian.kind, tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        load_posterior(path)


def test_refusals():
    gaussian = block()
    with pytest.raises(TypeError, match="must be a KroneckerSpectralLinearOperator; got Tensor"):
        KroneckerGaussian(gaussian.mean, torch.eye(12))
    with pytest.raises(ShapeError, match=r"mean must be \(d,\) and covariance d x d; got \(11,\) and \(12, 12\)"):
        KroneckerGaussian(gaussian.mean[1:], gaussian.covariance)
    with pytest.raises(ShapeError, match="layout has 6 coordinates; mean and covariance have 12"):
        KroneckerGaussian(gaussian.mean, gaussian.covariance, ParameterLayout.from_module(torch.nn.Linear(2, 2)))
    with pytest.raises(NonFiniteError, match="mean must be finite; entry 0 is nan"):
        KroneckerGaussian(gaussian.mean * float("nan"), gaussian.covariance)
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 12\); got \(3,\)"):
        gaussian.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="number of draws must be >= 0; got -1"):
        gaussian.sample(-1)
    with pytest.raises(TypeError, match="two KroneckerGaussians; got one and a GaussianPosterior"):
        kl_divergence(gaussian, GaussianPosterior.diagonal(torch.zeros(12), torch.ones(12)))
