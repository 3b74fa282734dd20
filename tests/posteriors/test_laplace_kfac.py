"""Kronecker-factored Laplace: its blocks against dense Gauss-Newton and K-FAC matrices, its draws, its evidence."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.laplace import DiagonalLaplace
from lowrank_bdl.posteriors.laplace_block import KroneckerGaussian
from lowrank_bdl.posteriors.laplace_kfac import KFACLaplace
from lowrank_bdl.posteriors.storage import load_posterior
from lowrank_bdl.prediction.predict import predict
from tests.curvature.cases import batches, build, categorical_hessians, jacobians, outputs_of
from tests.oracles import assert_close
from tests.statistical import assert_gaussian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def curvature_blocks(fitted):
    """The data's curvature, dense (D, D), from the fitted factors: Kronecker blocks, diagonals, and zeros if fixed."""
    layout = fitted.layout
    full = torch.zeros(layout.numel, layout.numel, dtype=torch.float64)
    for name, each in fitted.fisher.kronecker.items():
        left = (each.left_vectors * each.left_values[:, None]) @ each.left_vectors.mT
        right = (each.right_vectors * each.right_values[:, None]) @ each.right_vectors.mT
        groups, out, inner = each.eigenvalues.shape
        for group in range(groups):
            rows = torch.arange(out) + group * out
            width = inner - int(each.layer.bias is not None)
            places = layout.slices[name].start + rows[:, None] * width + torch.arange(width)
            if each.layer.bias is not None:
                places = torch.cat([places, layout.slices[each.layer.bias].start + rows[:, None]], 1)
            places = places.flatten()
            full[places[:, None], places] = torch.kron(left[group], right[group])
    for name, values in fitted.fisher.diagonal.items():
        full.diagonal()[layout.slices[name]] = values.flatten()
    return full


@pytest.mark.parametrize("name", ["mlp", "conv groups", "residual", "positions", "functional", "repeated"])
@pytest.mark.parametrize("others", ["diagonal", "fixed"])
def test_covariance_density_and_evidence(name, others):
    net, x, y = build(name)
    fitted = KFACLaplace(net, labels="expected", others=others).fit(batches(x, y), weight_decay=0.1, progress=False)
    posterior, tau, scale = fitted.posterior(scale=0.5), 0.7, 0.5
    kinds = fitted.kinds
    free = torch.zeros(fitted.layout.numel, dtype=torch.bool)
    for key in (*kinds.kronecker, *kinds.diagonal):
        free[fitted.layout.slices[key]] = True
    assert sorted((*kinds.kronecker, *kinds.diagonal, *kinds.fixed)) == sorted(fitted.layout.names)
    assert (kinds.diagonal, kinds.fixed)[others == "diagonal"] == ()
    hessian = curvature_blocks(fitted)[free][:, free]
    precision = hessian + tau * torch.eye(len(hessian), dtype=torch.float64)
    exact = scale * torch.linalg.inv(precision)
    covariance = posterior.covariance.to_dense()
    assert_close(covariance[free][:, free], exact, cond=100)
    assert not covariance[~free].any() and not covariance[:, ~free].any()
    shift = 0.01 * torch.randn(int(free.sum()), dtype=torch.float64, generator=generator())
    theta = posterior.mean.clone()
    theta[free] += shift
    zero = torch.zeros_like(shift)
    assert_close(posterior.log_prob(theta), MultivariateNormal(zero, exact).log_prob(shift), cond=1e3)
    assert_close(posterior.entropy(), MultivariateNormal(zero, exact).entropy(), cond=100)
    mode = fitted.mean[free]
    size = len(mode)
    evidence = (
        fitted.log_likelihood
        + 0.5 * size * math.log(tau / (2 * math.pi))
        - 0.5 * tau * mode.square().sum().item()
        + 0.5 * size * math.log(2 * math.pi)
        - 0.5 * precision.logdet().item()
    )
    assert fitted.log_marginal_likelihood() == pytest.approx(evidence, rel=1e-10)


def test_deep_linear_network_gives_the_exact_block_posterior():
    """Squared loss, expected labels: the covariance is the inverse of the block-diagonal Gauss-Newton matrix."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3, dtype=torch.float64, generator=generator(1)), torch.zeros(9, 2, dtype=torch.float64)
    variance, tau = 0.3, 2.0
    fitted = KFACLaplace(net, labels="expected", likelihood="gaussian", noise_variance=variance)
    posterior = fitted.fit([(x, y)], progress=False).posterior(tau)
    jacobian = jacobians(net, x)
    hessian = torch.einsum("nki,nkj->ij", jacobian, jacobian) / variance
    first = torch.arange(26) < 16
    hessian[first[:, None] != first] = 0
    exact = torch.linalg.inv(hessian + tau * torch.eye(26, dtype=torch.float64))
    assert_close(posterior.covariance.to_dense(), exact, cond=100)


def test_draws_of_a_whole_network():
    """Every block, across blocks too; a correct sampler fails with probability 1e-6, a wrong scale always."""
    net, x, y = build("batch norm")
    fitted = KFACLaplace(net, labels="true").fit([(x, y)], progress=False)
    posterior = fitted.posterior(0.5)
    exact = torch.linalg.inv(curvature_blocks(fitted) + 0.5 * torch.eye(39, dtype=torch.float64))
    draws = posterior.sample(3900, generator())
    assert_gaussian(draws, posterior.mean, exact)
    with pytest.raises(AssertionError, match="outside"):
        assert_gaussian(draws, posterior.mean, exact / 7)  # precisions of the mean, not of the sum


def test_sampled_labels_tend_to_the_expected_ones():
    """G is linear in the outer products: over many draws of labels it is that of the expected ones."""
    net, x, y = build("linear")
    many = [(x.repeat(10_000, 1), y.repeat(10_000))]
    sampled = KFACLaplace(net, labels="sampled").fit(many, generator=generator(), progress=False)
    exact = KFACLaplace(net, labels="expected").fit(many, progress=False)
    left, expected = (
        (each.left_vectors * each.left_values[:, None]) @ each.left_vectors.mT
        for each in (fit.fisher.kronecker["weight"] for fit in (sampled, exact))
    )
    # entries of g g' lie in [-1, 1]: by Hoeffding an error above 0.03 of 70,000 has probability below 9 * 2 e^-31
    assert (left - expected).abs().max() < 0.03
    true = KFACLaplace(net, labels="true").fit(many, progress=False).fisher.kronecker["weight"]
    assert ((true.left_vectors * true.left_values[:, None]) @ true.left_vectors.mT - expected).abs().max() > 0.1


def test_twice_the_data_give_twice_the_curvature():
    """N A kron G is a sum over the data, not a mean."""
    net, x, y = build("conv stride")
    once = KFACLaplace(net, labels="expected").fit([(x, y)], progress=False)
    twice = KFACLaplace(net, labels="expected").fit([(x, y)] * 2, progress=False)
    assert_close(curvature_blocks(twice), 2 * curvature_blocks(once), cond=10)


def test_blocks_and_layout():
    net, x, y = build("residual", dtype=torch.float32)
    fitted = KFACLaplace(net, labels="true").fit(batches(x, y), progress=False)
    posterior = fitted.posterior(1.0)
    assert isinstance(posterior, BlockPosterior) and posterior.layout == ParameterLayout.from_module(net)
    kinds = [type(block) for block in posterior.blocks]
    assert kinds == [KroneckerGaussian, GaussianPosterior, KroneckerGaussian, KroneckerGaussian]
    assert fitted.kinds.diagonal == ("bn.weight", "bn.bias") and fitted.kinds.fixed == ()
    assert posterior.sample(2, generator()).dtype == torch.float32
    fixed = KFACLaplace(net, labels="true", others="fixed").fit(batches(x, y), progress=False).posterior(1.0)
    moved = (fixed.sample(2, generator()) - fixed.mean)[:, fixed.layout.slices["bn.weight"].start :][:, :8]
    assert not moved.any() and (fixed.sample(2, generator()) - fixed.mean).abs().sum() > 0


def test_part_of_a_network():
    net, x, y = build("residual")
    fitted = KFACLaplace(net, labels="expected", include="head").fit([(x, y)], progress=False)
    jacobian = jacobians(net, x, fitted.layout)
    one = KFACLaplace(net, labels="expected", include="head").fit([(x[:1], y[:1])], progress=False)
    hessian = categorical_hessians(outputs_of(net, x[:1]))[0]
    assert_close(curvature_blocks(one), jacobian[0].mT @ hessian @ jacobian[0], cond=10)
    assert fitted.posterior(1.0).sample(2).shape == (2, 15)


def test_file(tmp_path):
    net, x, y = build("residual", dtype=torch.float32)
    posterior = KFACLaplace(net, labels="true").fit([(x, y)], weight_decay=0.1, progress=False).posterior()
    posterior.save(tmp_path / "laplace.safetensors")
    loaded = load_posterior(tmp_path / "laplace.safetensors", posterior.layout)
    assert loaded.provenance == posterior.provenance
    assert torch.equal(loaded.sample(3, generator()), posterior.sample(3, generator()))


def test_draws_of_wide_layers_are_those_of_their_file_to_the_last_bit(tmp_path):
    """Products of matrices that lie otherwise in memory are rounded otherwise; small ones are not."""
    net = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    data = [(torch.randn(60, 40, generator=generator()), torch.arange(60) % 3)]
    posterior = KFACLaplace(net, labels="expected").fit(data, weight_decay=0.1, progress=False).posterior()
    posterior.save(tmp_path / "laplace.safetensors")
    loaded = load_posterior(tmp_path / "laplace.safetensors")
    assert torch.equal(loaded.sample(9, generator(1)), posterior.sample(9, generator(1)))


@pytest.mark.parametrize("laplace", [DiagonalLaplace, KFACLaplace])
def test_predictions_average_over_the_posterior(laplace):
    """Draws of a wide posterior disagree; a very precise prior gives the network's own predictions."""
    net, x, y = build("residual", dtype=torch.float32)
    fitted = laplace(net, labels="expected").fit(batches(x, y), progress=False)
    own = outputs_of(net, x).softmax(-1)
    options = {"num_samples": 20, "generator": generator(), "progress": False, "bn_loader": "stored"}
    sharp = predict(net, fitted.posterior(1e12), [(x, y)], **options)
    assert_close(sharp.mean, own, torch.float32, 10)
    wide = predict(net, fitted.posterior(1.0), [(x, y)], **options)
    assert sharp.mutual_information.max() < 1e-6 and wide.mutual_information.min() > 0.05


def test_nothing_free():
    """Tied weights have no block of their own."""
    net, x, y = build("tied")
    with pytest.raises(ShapeError, match="No fully connected or convolution layer of the 3 parameters has a weight"):
        KFACLaplace(net, labels="true", others="fixed").fit([(x, y)], progress=False)
    posterior = KFACLaplace(net, labels="true").fit([(x, y)], progress=False).posterior(1.0)
    assert [type(block) for block in posterior.blocks] == [GaussianPosterior]


def test_refusals():
    with pytest.raises(ValueError, match="others must be 'diagonal' or 'fixed'; got 'kfac'"):
        KFACLaplace(nn.Linear(2, 2), labels="true", others="kfac")
    with pytest.raises(ValueError, match="KFACLaplace has no data yet"):
        _ = KFACLaplace(nn.Linear(2, 2), labels="true").kinds
