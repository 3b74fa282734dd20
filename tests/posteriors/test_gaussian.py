"""GaussianPosterior: one law in draws, density, entropy, KL, marginals and files."""

import copy
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior, kl_divergence
from lowrank_bdl.posteriors.swag import SWAG
from tests.oracles import assert_close
from tests.posteriors.cases import dense_swag, feed, iterates, network, swag_posterior
from tests.statistical import ALPHA, assert_chi_square, assert_gaussian

K = 5
N = 4000


def dense_normal(mean, covariance):
    return torch.distributions.MultivariateNormal(mean, covariance)


# ---- the sampler: full covariance, false-alarm rate ALPHA per test --------------------------------------------------


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("count,rank", [(12, K), (K, K), (3, K), (2, 1), (12, 0), (40, 20)])
def test_draws_have_the_covariance_of_the_definition(count, rank, centering):
    posterior, mean, covariance = swag_posterior(count=count, rank=rank, centering=centering)
    assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(1)), mean, covariance)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_draws_of_a_float32_posterior(stored):
    posterior, mean, covariance = swag_posterior(dtype=torch.float32, deviation_dtype=stored)
    assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(2)), mean, covariance)


def test_power_wrong_scale():
    posterior, _, _ = swag_posterior(scale=0.55)
    _, mean, covariance = swag_posterior(scale=0.5)
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(1)), mean, covariance)


def test_power_dropped_cross_layer_covariance():
    """Fresh low-rank noise for each tensor, as several libraries draw it, has every block right and is caught."""
    posterior, mean, covariance = swag_posterior()
    generator = torch.Generator().manual_seed(1)
    blocks = {name: posterior.marginal(name) for name in posterior.layout.names}
    draws = torch.cat([block.sample(N, generator) for block in blocks.values()], dim=1)
    for name, where in posterior.layout.slices.items():
        assert_gaussian(draws[:, where], mean[where], covariance[where, where])
        assert blocks[name].layout.names == (name,)
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(draws, mean, covariance)


def test_power_missing_divisor():
    posterior, mean, covariance = swag_posterior()
    sigma = posterior.covariance
    wrong = GaussianPosterior(
        posterior.mean, LowRankPlusDiagLinearOperator(sigma.root, sigma.diag, sigma.mix * math.sqrt(K - 1))
    )
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(wrong.sample(N, torch.Generator().manual_seed(1)), mean, covariance)


def test_power_variance_used_as_standard_deviation():
    """The bug that released subspace code had for years."""
    posterior, mean, covariance = swag_posterior()
    sigma = posterior.covariance
    wrong = GaussianPosterior(posterior.mean, LowRankPlusDiagLinearOperator(sigma.root, sigma.diag.square(), sigma.mix))
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(wrong.sample(N, torch.Generator().manual_seed(1)), mean, covariance)


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.5, 1.0, 2.0, 5.0])
def test_chi_square_coverage(scale):
    """Mahalanobis distances of draws under the dense Σ are χ²_D; fails on a correct sampler once in 1 / ALPHA seeds."""
    posterior, mean, covariance = swag_posterior(scale=scale)
    draws = posterior.sample(N, torch.Generator().manual_seed(3))
    precision = torch.linalg.inv(covariance)
    squares = ((draws - mean) @ precision * (draws - mean)).sum(1)
    assert_chi_square(squares, 13)
    # the density speaks of the same distances
    assert_close(2 * (posterior.log_prob(mean) - posterior.log_prob(draws)), squares, cond=1e3)
    with pytest.raises(AssertionError, match=r"chi-square\(13\) coverage"):
        assert_chi_square(1.15 * squares, 13)
    assert ALPHA <= 1e-6


def test_chi_square_coverage_above_gpytorchs_lanczos_limit():
    """Gpytorch's own class draws through a rank-100 root from 801 dimensions on."""
    model = nn.Linear(60, 20)
    posterior_thetas = iterates(30, model, size=1e-3)
    swag = feed(SWAG(model, 20), model, posterior_thetas)
    posterior = swag.posterior()
    mean, covariance = dense_swag(posterior_thetas, 20)
    draws = posterior.sample(2000, torch.Generator().manual_seed(0)).double()
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).mT, upper=False)
    assert_chi_square(whitened.square().sum(0), mean.numel())


# ---- shapes, reproducibility, gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n,shape",
    [
        (0, (0, 13)),
        (1, (1, 13)),
        (3, (3, 13)),
        (torch.Size(), (13,)),
        (torch.Size([2, 3]), (2, 3, 13)),
        ((4,), (4, 13)),
    ],
)
def test_sample_shapes(n, shape):
    posterior, _, _ = swag_posterior()
    assert posterior.sample(n).shape == posterior.rsample(n).shape == shape


def test_draws_come_from_the_generator():
    posterior, _, _ = swag_posterior()
    state = torch.get_rng_state()
    one = posterior.sample(3, torch.Generator().manual_seed(5))
    assert torch.equal(one, posterior.sample(3, torch.Generator().manual_seed(5)))
    assert not torch.equal(one, posterior.sample(3, torch.Generator().manual_seed(6)))
    assert torch.equal(state, torch.get_rng_state())


def test_rsample_has_gradients_and_sample_has_none():
    mean = torch.zeros(3, requires_grad=True)
    root, diag = torch.ones(3, 1, requires_grad=True), torch.ones(3, requires_grad=True)
    posterior = GaussianPosterior(mean, LowRankPlusDiagLinearOperator(root, diag))
    assert not posterior.sample(2).requires_grad
    posterior.rsample(2).sum().backward()
    assert torch.equal(mean.grad, torch.full((3,), 2.0)) and root.grad is not None and diag.grad is not None
    only_mean = GaussianPosterior(mean, LowRankPlusDiagLinearOperator(torch.ones(3, 1), torch.ones(3)))
    assert only_mean.rsample(1).requires_grad


# ---- densities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("count,rank", [(12, K), (3, K), (12, 0), (2, 1)])
def test_log_prob_entropy_and_stddev(count, rank, centering):
    posterior, mean, covariance = swag_posterior(count=count, rank=rank, centering=centering)
    normal = dense_normal(mean, covariance)
    thetas = iterates(6, seed=3, dtype=torch.float64).view(2, 3, 13)
    cond = torch.linalg.cond(covariance).item()
    assert_close(posterior.log_prob(thetas), normal.log_prob(thetas), cond=cond)
    assert_close(posterior.log_prob(thetas[0, 0]), normal.log_prob(thetas[0, 0]), cond=cond)
    assert_close(posterior.entropy(), normal.entropy(), cond=cond)
    assert_close(posterior.stddev, covariance.diagonal().sqrt())
    assert_close(posterior.distribution.variance, covariance.diagonal())


def test_kl_divergence():
    p, p_mean, p_covariance = swag_posterior(scale=0.5)
    q, q_mean, q_covariance = swag_posterior(scale=2.0, count=8, rank=3)
    expected = torch.distributions.kl_divergence(dense_normal(p_mean, p_covariance), dense_normal(q_mean, q_covariance))
    assert_close(kl_divergence(p, q), expected, cond=torch.linalg.cond(q_covariance).item())
    assert kl_divergence(p, p).abs() < 1e-6
    other = GaussianPosterior(p.mean, p.covariance, ParameterLayout.from_module(nn.Linear(12, 1)))
    with pytest.raises(ShapeError, match="over different parameters: parameter number 0: expected '0.weight'"):
        kl_divergence(p, other)


def test_point_masses():
    """A weight that never moved is left out of the density, and any other value of it is impossible."""
    model = network()
    thetas = iterates(9)
    thetas[:, 4] = 0.25
    posterior = feed(SWAG(model, K), model, thetas).posterior()
    mean, covariance = dense_swag(thetas, K)
    free = torch.arange(13) != 4
    theta = thetas[0].clone()
    expected = dense_normal(mean[free], covariance[free][:, free]).log_prob(theta[free].double())
    assert_close(posterior.log_prob(theta), expected, torch.float32, cond=100)
    theta[4] = 0.3
    assert posterior.log_prob(theta) == -math.inf
    assert torch.equal(posterior.sample(3)[:, 4], torch.full((3,), 0.25))


# ---- marginals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [None, torch.float16], ids=str)
@pytest.mark.parametrize(
    "include,exclude", [("0", None), (None, "0.weight"), ("*.weight", None), ("*.bias", "0"), (None, None)]
)
def test_marginal_is_the_dense_block(include, exclude, stored):
    posterior, mean, _ = swag_posterior(deviation_dtype=stored)
    covariance = posterior.covariance.to_dense()
    marginal = posterior.marginal(include, exclude)
    names = torch.cat([torch.full((s.stop - s.start,), i) for i, s in enumerate(posterior.layout.slices.values())])
    kept = torch.isin(names, torch.tensor([posterior.layout.names.index(n) for n in marginal.layout.names]))
    assert marginal.mean.numel() == marginal.layout.numel == int(kept.sum())
    assert_close(marginal.mean, mean[kept])
    assert_close(marginal.covariance.to_dense(), covariance[kept][:, kept])
    assert isinstance(marginal.covariance, LowRankPlusDiagLinearOperator) and marginal.covariance.rank == K
    theta = marginal.mean + 0.1
    block = dense_normal(mean[kept], covariance[kept][:, kept])
    assert_close(marginal.log_prob(theta), block.log_prob(theta), cond=1e3)
    assert marginal.provenance == posterior.provenance


def test_marginal_refuses():
    posterior, _, _ = swag_posterior()
    with pytest.raises(ShapeError, match="matches none of the 4 parameters"):
        posterior.marginal("3.weight")
    with pytest.raises(ShapeError, match="needs a layout; this posterior has none"):
        GaussianPosterior(posterior.mean, posterior.covariance).marginal("0")


# ---- conversions ----------------------------------------------------------------------------------------------------


def test_to_changes_dtype_of_every_result():
    posterior, _, _ = swag_posterior(dtype=torch.float32)
    wide = posterior.to(torch.float64)
    assert wide.mean.dtype == wide.sample(1).dtype == wide.covariance.dtype == torch.float64
    assert_close(wide.covariance.to_dense(), posterior.covariance.to_dense().double(), torch.float32)
    assert wide.layout == posterior.layout and wide.provenance == posterior.provenance
    assert posterior.mean.dtype == torch.float32


def test_repr():
    posterior, _, _ = swag_posterior()
    assert repr(posterior) == "GaussianPosterior(numel=13, rank=5, dtype=torch.float64)"


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(
    "count,rank,centering", [(12, None, "running"), (12, 2, "final"), (3, None, "final"), (12, 0, "running")]
)
def test_saved_posterior_draws_the_same_bits(count, rank, centering, stored, tmp_path):
    model = network()
    swag = feed(SWAG(model, K, deviation_dtype=stored, centering=centering), model, iterates(count))
    posterior = swag.posterior(scale=0.7, rank=rank)
    posterior.save(tmp_path / "p.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    loaded = GaussianPosterior.load(tmp_path / "p.safetensors", layout=swag.layout)
    one, other = (p.sample(4, torch.Generator().manual_seed(0)) for p in (posterior, loaded))
    assert torch.equal(one, other)
    assert torch.equal(posterior.log_prob(one), loaded.log_prob(one))
    assert loaded.layout == posterior.layout and loaded.covariance.root.dtype == posterior.covariance.root.dtype
    assert (
        loaded.provenance
        == posterior.provenance
        == {
            "source": "swag",
            "n_averaged": count,
            "n_seen": count,
            "rank": K if rank is None else rank,
            "rows": min(count, K if rank is None else rank),
            "scale": 0.7,
            "centering": centering,
            "correction": 1,
        }
    )
    swag.update_parameters(model)
    assert torch.equal(loaded.sample(4, torch.Generator().manual_seed(0)), one)  # the file's posterior owns its tensors


def test_saving_over_the_file_it_was_loaded_from(tmp_path):
    posterior, _, _ = swag_posterior()
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    loaded = GaussianPosterior.load(str(path))
    loaded.save(path)
    other, _, _ = swag_posterior(scale=5.0)
    other.save(path)
    assert torch.equal(loaded.covariance.to_dense(), posterior.covariance.to_dense())
    assert torch.equal(GaussianPosterior.load(path).covariance.to_dense(), other.covariance.to_dense())


def test_posterior_without_layout(tmp_path):
    posterior, _, _ = swag_posterior()
    bare = GaussianPosterior(posterior.mean, posterior.covariance)
    bare.save(tmp_path / "p.safetensors")
    assert GaussianPosterior.load(tmp_path / "p.safetensors").layout is None
    with pytest.raises(CheckpointError, match="holds no layout to compare with"):
        GaussianPosterior.load(tmp_path / "p.safetensors", layout=posterior.layout)


def test_file_of_other_parameters(tmp_path):
    posterior, _, _ = swag_posterior()
    posterior.save(tmp_path / "p.safetensors")
    other = ParameterLayout.from_module(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(
        CheckpointError, match=r"other parameters: parameter '2.weight': expected shape \(2, 3\), got \(1, 3"
    ):
        GaussianPosterior.load(tmp_path / "p.safetensors", layout=other)
    half = ParameterLayout.from_module(network(torch.float16))
    assert GaussianPosterior.load(tmp_path / "p.safetensors", layout=half).mean.numel() == 13


def test_file_is_readable_by_safetensors_alone(tmp_path):
    posterior, _, _ = swag_posterior()
    posterior.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as stream:
        assert sorted(stream.keys()) == ["deviations", "diag", "mean", "mix"]
        assert stream.get_tensor("deviations").shape == (K, 13)
        assert stream.metadata()["format"] == "lowrank_bdl" and stream.metadata()["version"] == "1"


def test_contradictory_file(tmp_path):
    from lowrank_bdl.linalg.files import write_tensors

    good = {"mean": torch.zeros(3), "diag": torch.ones(3), "deviations": torch.ones(2, 3), "mix": torch.tensor(1.0)}
    for change, message in [
        ({"diag": torch.ones(4)}, r"contradicts itself: root must be"),
        ({"diag": -torch.ones(3)}, "contradicts itself: diag holds negative or non-finite numbers"),
        ({"mix": torch.tensor(float("inf"))}, "contradicts itself: mix holds negative or non-finite numbers"),
        ({"mean": torch.ones(4)}, r"contradicts itself: mean must be"),
        ({"mean": torch.tensor([1.0, float("nan"), 0.0])}, "contradicts itself: mean must be finite; entry 1 is nan"),
        ({"diag": torch.ones(3, dtype=torch.int64)}, "contradicts itself: diag must be float32 or float64"),
    ]:
        write_tensors(tmp_path / "p.safetensors", "gaussian posterior", {**good, **change}, {"layout": None})
        with pytest.raises(CheckpointError, match=message):
            GaussianPosterior.load(tmp_path / "p.safetensors")
    write_tensors(tmp_path / "p.safetensors", "gaussian posterior", good, {"layout": {"names": ["a"]}})
    with pytest.raises(CheckpointError, match="layout needs names, shapes, dtypes"):
        GaussianPosterior.load(tmp_path / "p.safetensors")


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_error_messages():
    sigma = LowRankPlusDiagLinearOperator(torch.ones(3, 1), torch.ones(3))
    with pytest.raises(ShapeError, match=r"mean must be \(D,\) and covariance D x D; got \(4,\) and \(3, 3\)"):
        GaussianPosterior(torch.zeros(4), sigma)
    with pytest.raises(ShapeError, match=r"got \(2, 3\) and"):
        GaussianPosterior(torch.zeros(2, 3), sigma)
    with pytest.raises(ShapeError, match="layout has 13 coordinates; mean and covariance have 3"):
        GaussianPosterior(torch.zeros(3), sigma, ParameterLayout.from_module(network()))
    with pytest.raises(TypeError, match="must be a LowRankPlusDiagLinearOperator; got Tensor"):
        GaussianPosterior(torch.zeros(3), torch.eye(3))
    with pytest.raises(NonFiniteError, match="mean must be finite; entry 2 is inf"):
        GaussianPosterior(torch.tensor([0.0, 1.0, float("inf")]), sigma)
    posterior = GaussianPosterior(torch.zeros(3), sigma)
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 3\); got \(2, 4\)"):
        posterior.log_prob(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="number of draws must be >= 0; got -1"):
        posterior.sample(-1)


def test_diagonal_is_the_gaussian_of_independent_weights():
    mean, variance = torch.arange(13.0).double(), torch.linspace(0.1, 2, 13).double()
    posterior = GaussianPosterior.diagonal(mean, variance, swag_posterior()[0].layout, {"source": "test"})
    normal = dense_normal(mean, torch.diag(variance))
    theta = mean + 0.3
    assert posterior.covariance.rank == 0 and posterior.provenance == {"source": "test"}
    assert_close(posterior.stddev, variance.sqrt())
    assert_close(posterior.covariance.to_dense(), torch.diag(variance))
    assert_close(posterior.log_prob(theta), normal.log_prob(theta))
    assert_close(posterior.entropy(), normal.entropy())
    assert_close(posterior.marginal("2").stddev, variance[9:].sqrt())
    assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(0)), mean, torch.diag(variance))
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(posterior.sample(N, torch.Generator().manual_seed(0)), mean, torch.diag(variance * 1.1))


def test_diagonal_refuses():
    with pytest.raises(ShapeError, match=r"mean and variance must be \(D,\); got \(3,\) and \(2,\)"):
        GaussianPosterior.diagonal(torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"variance must be >= 0; the smallest is -1\.0"):
        GaussianPosterior.diagonal(torch.zeros(2), torch.tensor([1.0, -1.0]))
    with pytest.raises(NonFiniteError, match="variance must be finite; entry 1 is nan"):
        GaussianPosterior.diagonal(torch.zeros(2), torch.tensor([1.0, float("nan")]))
    with pytest.raises(ShapeError, match="layout has 13 coordinates; mean and covariance have 2"):
        GaussianPosterior.diagonal(torch.zeros(2), torch.ones(2), ParameterLayout.from_module(network()))
    with pytest.raises(TypeError, match="diag must be float32 or float64, got torch.float16"):
        GaussianPosterior.diagonal(torch.zeros(2), torch.ones(2).half())


def test_deepcopy():
    posterior, _, _ = swag_posterior()
    twin = copy.deepcopy(posterior)
    assert torch.equal(twin.covariance.to_dense(), posterior.covariance.to_dense()) and twin.layout == posterior.layout
