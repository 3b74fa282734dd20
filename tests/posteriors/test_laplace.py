"""Laplace approximations: exact linear regression, the diagonal law, the prior, and what is refused."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.laplace import DiagonalLaplace
from lowrank_bdl.posteriors.laplace_kfac import KFACLaplace
from tests.curvature.cases import batches, build, categorical_hessians, jacobians, outputs_of
from tests.oracles import assert_close
from tests.statistical import assert_gaussian

BOTH = pytest.mark.parametrize("laplace", [DiagonalLaplace, KFACLaplace])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def regression(tau, variance, orthogonal):
    """A linear network at the mode for tau, its data, and the design with a column of ones."""
    x = torch.randn(12, 3, dtype=torch.float64, generator=generator(1))
    if orthogonal:  # to the ones as well, so that the exact curvature is diagonal
        x = torch.linalg.qr(torch.cat([torch.ones(12, 1, dtype=torch.float64), x], 1))[0][:, 1:] * 2.0
    y = torch.randn(12, 2, dtype=torch.float64, generator=generator(2))
    design = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], 1)
    gram = design.mT @ design / variance
    mode = torch.linalg.solve(gram + tau * torch.eye(4, dtype=torch.float64), design.mT @ y / variance)
    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(mode[:-1].mT)
        net.bias.copy_(mode[-1])
    return net, x, y, design


@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
@BOTH
def test_evidence_of_linear_regression_is_exact(laplace, tau):
    """Against N(y; 0, X X' / tau + s2 I) of each output: every constant counts, the sizes of N, D and s2 included."""
    variance = 0.4
    net, x, y, design = regression(tau, variance, orthogonal=laplace is DiagonalLaplace)
    marginal = MultivariateNormal(
        torch.zeros(12, dtype=torch.float64), design @ design.mT / tau + variance * torch.eye(12, dtype=torch.float64)
    )
    fitted = laplace(net, labels="expected", likelihood="gaussian", noise_variance=variance)
    fitted.fit(batches(x, y, (5, 5, 2)), progress=False)
    exact = marginal.log_prob(y.mT).sum()
    assert_close(torch.tensor(fitted.log_marginal_likelihood(tau), dtype=torch.float64), exact, cond=100)
    likelihood = torch.distributions.Normal(net(x).detach(), variance**0.5).log_prob(y).sum()
    assert_close(torch.tensor(fitted.log_likelihood, dtype=torch.float64), likelihood)
    assert fitted.prior_precision is None  # evaluating stores nothing


@BOTH
def test_posterior_of_linear_regression_is_exact(laplace):
    tau, variance, scale = 0.7, 0.4, 1.5
    net, x, y, design = regression(tau, variance, orthogonal=laplace is DiagonalLaplace)
    fitted = laplace(net, labels="expected", likelihood="gaussian", noise_variance=variance)
    posterior = fitted.fit([(x, y)], progress=False).posterior(tau, scale)
    inverse = torch.linalg.inv(design.mT @ design / variance + tau * torch.eye(4, dtype=torch.float64)) * scale
    order = torch.tensor([0, 1, 2, 4, 5, 6, 3, 7])  # two rows of weights, then two biases
    exact = torch.block_diag(inverse, inverse)[order][:, order]
    assert_close(posterior.covariance.to_dense(), exact, cond=10)
    assert_close(posterior.mean, ParameterLayout.from_module(net).flatten(net))
    assert_gaussian(posterior.sample(2000, generator()), posterior.mean, exact)
    assert_close(
        posterior.log_prob(posterior.mean + 0.1),
        MultivariateNormal(posterior.mean, exact).log_prob(posterior.mean + 0.1),
        cond=100,
    )
    assert posterior.provenance == {
        "source": "laplace",
        "structure": "diagonal" if laplace is DiagonalLaplace else "kfac",
        "labels": "expected",
        "likelihood": "gaussian",
        "num_data": 12,
        "prior_precision": tau,
        "scale": scale,
    } | ({} if laplace is DiagonalLaplace else {"others": "diagonal"})


def test_diagonal_law():
    net, x, y = build("residual", dtype=torch.float32)
    jacobian, hessians = jacobians(net, x), categorical_hessians(outputs_of(net, x))
    fisher = torch.einsum("nkd,nkl,nld->d", jacobian, hessians, jacobian)
    fitted = DiagonalLaplace(net, labels="expected").fit(batches(x, y), weight_decay=0.1, progress=False)
    assert fitted.num_data == 7 and fitted.prior_precision == pytest.approx(0.7)
    assert_close(fitted.fisher_diagonal, fisher, torch.float32, 10)
    posterior = fitted.posterior()
    assert isinstance(posterior, GaussianPosterior) and posterior.covariance.rank == 0
    assert posterior.mean.dtype == torch.float32 and posterior.layout == fitted.layout
    assert_close(posterior.stddev, (fisher + 0.7).rsqrt(), torch.float32, 10)
    assert_close(fitted.posterior(5.0, 0.5).stddev, (0.5 / (fisher + 5)).sqrt(), torch.float32, 10)


def test_draws_of_the_diagonal():
    """Fails with probability 1e-6 for a correct sampler; the released code's F of batch means fails always."""
    net, x, y = build("mlp")
    fitted = DiagonalLaplace(net, labels="true").fit([(x, y)], progress=False)
    posterior = fitted.posterior(1.0)
    exact = (1 / (fitted.fisher_diagonal + 1)).diag()
    draws = posterior.sample(100 * 28, generator())
    assert_gaussian(draws, fitted.mean, exact)
    scores = outputs_of(net, x).softmax(-1) - nn.functional.one_hot(y, 3)
    batch_mean = torch.einsum("nk,nkd->nd", scores, jacobians(net, x)).mean(0).square()
    with pytest.raises(AssertionError, match="covariance"):
        assert_gaussian(draws, fitted.mean, (1 / (batch_mean + 1)).diag())


@BOTH
def test_marginal_likelihood_chooses_the_best_precision(laplace):
    net, x, y = build("mlp")
    fitted = laplace(net, labels="expected").fit(batches(x, y), progress=False)
    best = fitted.optimize_prior_precision()
    assert best == fitted.prior_precision and fitted.search == [(best, -fitted.log_marginal_likelihood())]
    top = fitted.log_marginal_likelihood()
    grid = best * torch.logspace(-3, 3, 61, dtype=torch.float64)
    values = torch.tensor([fitted.log_marginal_likelihood(float(tau)) for tau in grid])
    assert values.argmax() == 30 and bool((values <= top + 1e-12).all())
    near = [fitted.log_marginal_likelihood(best * factor) for factor in (0.9999, 1.0001)]
    assert max(near) < top


@BOTH
def test_validation_loss_chooses_the_best_precision(laplace):
    net, x, y = build("mlp")
    fitted = laplace(net, labels="true").fit([(x, y)], progress=False)
    target = fitted.posterior(7 * 10**-2.5).stddev

    def loss(posterior):
        return (posterior.stddev - target).abs().sum().item()

    assert fitted.optimize_prior_precision(loss) == pytest.approx(7 * 10**-2.5)
    assert len(fitted.search) == 17
    assert fitted.search[0][0] == pytest.approx(7e-8) and fitted.search[-1][0] == pytest.approx(7.0)
    assert fitted.optimize_prior_precision(loss, grid=[0.02, 0.5]) == 0.02 == fitted.prior_precision
    assert [tau for tau, _ in fitted.search] == [0.02, 0.5]
    assert fitted.optimize_prior_precision(lambda posterior: 1.0, grid=[1.0, 3.0, 2.0]) == 3.0  # ties: the narrower
    losses = iter([float("nan"), 2.0, float("inf")])
    assert fitted.optimize_prior_precision(lambda posterior: next(losses), grid=[1.0, 2.0, 3.0]) == 2.0


@BOTH
def test_prior_must_be_known(laplace):
    net, x, y = build("linear")
    fitted = laplace(net, labels="true")
    with pytest.raises(ValueError, match=rf"{laplace.__name__} has no data yet; call fit\(loader\) first"):
        fitted.posterior(1.0)
    for use in (lambda: fitted.num_data, lambda: fitted.log_likelihood, fitted.optimize_prior_precision):
        with pytest.raises(ValueError, match="has no data yet"):
            use()
    fitted.fit([(x, y)], progress=False)
    for use in (fitted.posterior, fitted.log_marginal_likelihood):
        with pytest.raises(ValueError, match="no prior precision is known: give prior_precision="):
            use()
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="prior_precision must be a positive number; got"):
                use(value)
    with pytest.raises(ValueError, match="prior_precision must be a positive number; got 0"):
        fitted.prior_precision = 0
    fitted.prior_precision = 2
    assert fitted.posterior().provenance["prior_precision"] == 2.0
    with pytest.raises(ValueError, match="scale must be a positive number; got 0"):
        fitted.posterior(scale=0)
    with pytest.raises(ValueError, match="weight_decay must be a positive number; got 0"):
        fitted.fit([(x, y)], weight_decay=0, progress=False)
    with pytest.raises(ValueError, match="method must be 'marginal_likelihood' or a function of a posterior; got 'cv'"):
        fitted.optimize_prior_precision("cv")
    with pytest.raises(ValueError, match="grid goes with a validation loss"):
        fitted.optimize_prior_precision(grid=[1.0])
    with pytest.raises(ValueError, match="each precision of the grid must be a positive number; got -1"):
        fitted.optimize_prior_precision(lambda posterior: 0.0, grid=[1.0, -1.0])
    for grid, loss in (([], 0.0), ([1.0], float("nan"))):
        with pytest.raises(ValueError, match="validation loss must be finite somewhere on the grid; got"):
            fitted.optimize_prior_precision(lambda posterior, loss=loss: loss, grid=grid)
    assert fitted.prior_precision == 2  # an error changes nothing


@BOTH
def test_a_failed_fit_keeps_the_last_one(laplace):
    net, x, y = build("linear")
    fitted = laplace(net, labels="true").fit([(x, y)], weight_decay=0.1, progress=False)
    before = fitted.log_marginal_likelihood()
    with pytest.raises(NonFiniteError, match="outputs must be finite; got NaN or infinite ones in batch 1"):
        fitted.fit([(x, y), (x * float("nan"), y)], weight_decay=0.2, progress=False)
    with pytest.raises(ShapeError, match="at least one example; got none"):
        fitted.fit([], progress=False)
    assert fitted.log_marginal_likelihood() == before and fitted.prior_precision == pytest.approx(0.7)
    assert fitted.fit([(x, y)] * 2, progress=False).num_data == 14  # a second fit replaces the first


@BOTH
def test_arguments(laplace):
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="labels"):
        laplace(net)
    with pytest.raises(ValueError, match="labels must be one of 'true', 'sampled', 'expected'; got 'empirical'"):
        laplace(net, labels="empirical")
    with pytest.raises(ValueError, match="likelihood must be 'categorical', 'bernoulli' or 'gaussian'; got 'poisson'"):
        laplace(net, labels="true", likelihood="poisson")
    with pytest.raises(ValueError, match="noise_variance must be a positive number; got 0"):
        laplace(net, labels="true", likelihood="gaussian", noise_variance=0.0)
    with pytest.raises(ShapeError, match="include pattern 'head' matches none"):
        laplace(net, labels="true", include="head")
    with torch.no_grad():
        net.bias[1] = float("nan")
    with pytest.raises(NonFiniteError, match="the model's weights must be finite; parameter 'bias' has nan"):
        laplace(net, labels="true")


@BOTH
def test_the_mean_is_that_of_construction_and_the_model_stays(laplace):
    net, x, y = build("batch norm")
    fitted = laplace(net, labels="true")
    theta = fitted.layout.flatten(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net[0].weight.zero_()
    fitted.fit([(x, y)], progress=False)
    assert torch.equal(fitted.posterior(1.0).mean, theta)
    assert not net[0].weight.any() and net.training
    net[0].weight.data.copy_(before["0.weight"])
    again = laplace(net, labels="true").fit([(x, y)], progress=False)
    assert fitted.log_likelihood == again.log_likelihood
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_sampled_labels_come_from_the_generator():
    net, x, y = build("conv")
    fit = lambda seed: DiagonalLaplace(net, labels="sampled").fit(  # noqa: E731
        [(x, y)], generator=generator(seed), progress=False
    )
    assert torch.equal(fit(0).fisher_diagonal, fit(0).fisher_diagonal)
    assert not torch.equal(fit(0).fisher_diagonal, fit(1).fisher_diagonal)


def test_progress_bar(terminal):
    net, x, y = build("linear")
    DiagonalLaplace(net, labels="true").fit([(x, y)])
    assert "Fisher information" in terminal.readouterr().err
