"""What is measured of predictions, and the Gaussian references against dense linear algebra and known truths."""

import math

import gpytorch
import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

import lowrank_bdl as lb
from experiments.uci_data import RegressionSplit
from experiments.uci_linear import exact_gp, features_of, neural_linear
from experiments.uci_metrics import Forecast, metrics_of
from lowrank_bdl.models import create_model


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_metrics_of_gaussians_are_scipys_in_both_units() -> None:
    mean, variance, y = normals(50, seed=0), normals(50, seed=1).exp(), normals(50, seed=2)
    found = metrics_of(Forecast.gaussian(mean, variance, y), std=4.0)
    law, original = stats.norm(mean, variance.sqrt()), stats.norm(4 * mean, 4 * variance.sqrt())
    assert found["normalized_log_likelihood"] == pytest.approx(law.logpdf(y).mean(), rel=1e-12)
    assert found["log_likelihood"] == pytest.approx(original.logpdf(4 * y).mean(), rel=1e-12)
    assert found["gaussian_log_likelihood"] == pytest.approx(found["log_likelihood"], rel=1e-12)
    assert found["rmse"] == pytest.approx(4 * ((y - mean) ** 2).mean().sqrt().item(), rel=1e-12)
    low, high = law.interval(0.95)
    assert found["coverage"] == ((y.numpy() > low) & (y.numpy() < high)).mean()
    assert 0.5 < found["coverage"] < 1


def test_a_model_average_has_a_mixtures_density_and_its_moments() -> None:
    net = create_model("RegNet", 1, in_features=2, hidden=(3,))
    thetas = torch.randn(4, lb.ParameterLayout.from_module(net).numel, generator=torch.Generator().manual_seed(0))
    x, y = normals(6, 2, seed=1).float(), normals(6, 1, seed=2).float()
    forecast = Forecast.of(lb.predict(net, thetas, [(x, y)], likelihood="gaussian", progress=False))
    alone = lb.FunctionalModel(net)
    parts = [alone(theta, x) for theta in thetas]
    means, variances = (torch.stack([part[i][:, 0].double() for part in parts]) for i in (0, 1))
    density = stats.norm(means.detach(), variances.detach().sqrt()).pdf(y[:, 0].numpy()).mean(0)
    np.testing.assert_allclose(forecast.log_likelihood, np.log(density), rtol=1e-5, atol=1e-6)
    second = (variances + means.square()).mean(0) - means.mean(0).square()
    torch.testing.assert_close(forecast.mean, means.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(forecast.variance, second, atol=1e-6, rtol=1e-5)


def regression(function: str, noise: float, seed: int = 0) -> RegressionSplit:
    x = 2 * normals(180, 2, seed=seed)
    clean = x[:, :1] - 0.5 * x[:, 1:] if function == "linear" else (x[:, :1]).sin()
    y = clean + noise * normals(180, 1, seed=seed + 1)
    return RegressionSplit(x[:120], y[:120], x[120:], y[120:], 0.0, 1.0)


def test_neural_linear_is_the_dense_posterior_at_the_evidences_maximum() -> None:
    net = create_model("RegNet", 1, in_features=2, hidden=(8, 5))
    layout, split = lb.ParameterLayout.from_module(net), regression("sine", 0.3)
    theta = torch.randn(layout.numel, generator=torch.Generator().manual_seed(3))
    forecast, facts = neural_linear(net, layout, theta, split)
    phi, phi_test = (features_of(net, layout, theta, x) for x in (split.x_train, split.x_test))
    assert phi.shape == (120, 6) and bool((phi[:, -1] == 1).all()) and bool((phi >= 0).all())
    y = split.y_train[:, 0]

    def negative_evidence(logs: np.ndarray) -> float:
        covariance = math.exp(logs[0]) * (phi @ phi.mT).numpy() + math.exp(logs[1]) * np.eye(120)
        return -float(stats.multivariate_normal(np.zeros(120), covariance).logpdf(y.numpy()))

    best = optimize.minimize(negative_evidence, np.zeros(2), method="Nelder-Mead", options={"fatol": 1e-9})
    np.testing.assert_allclose(np.log([facts["weight_variance"], facts["noise_variance"]]), best.x, atol=2e-3)
    alpha, noise = facts["weight_variance"], facts["noise_variance"]
    dense = alpha * phi @ phi.mT + noise * torch.eye(120, dtype=torch.float64)
    cross = alpha * phi_test @ phi.mT
    own = (alpha * phi_test.square().sum(1) + noise) - (cross * torch.linalg.solve(dense, cross.mT).mT).sum(1)
    torch.testing.assert_close(forecast.mean, cross @ torch.linalg.solve(dense, y), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(forecast.variance, own, atol=1e-8, rtol=1e-8)


def test_the_network_stays_as_it_is() -> None:
    net = create_model("RegNet", 1, in_features=2, hidden=(3,))
    layout, before = lb.ParameterLayout.from_module(net), [p.clone() for p in net.parameters()]
    features_of(net, layout, torch.ones(layout.numel), torch.zeros(4, 2))
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_the_gaussian_process_finds_the_noise_and_the_function() -> None:
    forecast, facts = exact_gp(regression("sine", 0.2), 1000, 80, torch.Generator().manual_seed(0))
    assert facts["rows"] == 120 and 0.02 < facts["noise_variance"] < 0.08  # the truth is 0.04
    assert metrics_of(forecast, 1.0)["rmse"] < 0.3  # of noise 0.2; the targets' own standard deviation is 0.7
    assert 0.85 <= metrics_of(forecast, 1.0)["coverage"] <= 1
    few, facts = exact_gp(regression("sine", 0.2), 30, 20, torch.Generator().manual_seed(0))
    assert facts["rows"] == 30 and few.mean.shape == (60,)


def test_the_gaussian_process_is_the_dense_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[gpytorch.models.ExactGP] = []
    to_double = gpytorch.models.ExactGP.double
    monkeypatch.setattr(gpytorch.models.ExactGP, "double", lambda self: kept.append(self) or to_double(self))
    split = regression("sine", 0.2)
    forecast, facts = exact_gp(split, 1000, 5, torch.Generator().manual_seed(0))
    kernel, constant = kept[0].covar_module, kept[0].mean_module.constant.item()
    widths, scale = kernel.base_kernel.lengthscale.detach(), kernel.outputscale.item()

    def dense(a: Tensor, b: Tensor) -> Tensor:
        return scale * (-0.5 * ((a[:, None] - b[None]) / widths).square().sum(-1)).exp()

    covariance = dense(split.x_train, split.x_train) + facts["noise_variance"] * torch.eye(120, dtype=torch.float64)
    cross = dense(split.x_test, split.x_train)
    mean = constant + cross @ torch.linalg.solve(covariance, split.y_train[:, 0] - constant)
    variance = scale + facts["noise_variance"] - (cross * torch.linalg.solve(covariance, cross.mT).mT).sum(1)
    torch.testing.assert_close(forecast.mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(forecast.variance, variance, atol=1e-6, rtol=1e-6)
