"""Gaussian references: Bayesian linear regression on a network's features, and an exact Gaussian process."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.uci_data import RegressionSplit
from experiments.uci_metrics import Forecast

EVIDENCE_STEPS = 100
GP_RATE = 0.3  # falls to 0 along a cosine


def features_of(net: nn.Module, layout: lb.ParameterLayout, theta: Tensor, x: Tensor) -> Tensor:
    """Return a ``RegNet``'s last hidden layer and a constant, (n, H + 1), float64."""
    own = copy.deepcopy(net)
    layout.assign_(own, theta)
    body = nn.Sequential(*list(own.children())[:-2])  # without the last linear layer and the variance
    with torch.no_grad():
        hidden = body(x.to(theta.dtype)).double()
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)


def neural_linear(
    net: nn.Module, layout: lb.ParameterLayout, theta: Tensor, split: RegressionSplit
) -> tuple[Forecast, dict[str, Any]]:
    r"""Regress the targets on the features: :math:`y = \phi^\top w + \epsilon`, w ~ N(0, α I), ε ~ N(0, σ²).

    α and σ² maximise the evidence, the density of the training targets under
    :math:`N(0, \alpha \Phi \Phi^\top + \sigma^2 I)`. The posterior is of the weights; no matrix over the test rows is
    made.
    """
    phi, phi_test = (features_of(net, layout, theta, x) for x in (split.x_train, split.x_test))
    y = split.y_train.squeeze(1)
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # of α and σ²
    optimizer = torch.optim.LBFGS([logs], max_iter=EVIDENCE_STEPS, line_search_fn="strong_wolfe")

    def negative_evidence() -> Tensor:
        optimizer.zero_grad()
        alpha, noise = logs.exp()
        covariance = lb.LowRankPlusDiagLinearOperator(alpha.sqrt() * phi, noise.expand(len(y)))
        loss = -lb.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y) / len(y)
        loss.backward()
        return loss.detach()

    optimizer.step(negative_evidence)
    alpha, noise = logs.detach().exp()
    precision = phi.mT @ phi / noise + torch.eye(phi.shape[1], dtype=torch.float64) / alpha
    factor = torch.linalg.cholesky(precision)
    mean = phi_test @ torch.cholesky_solve((phi.mT @ y / noise).unsqueeze(1), factor).squeeze(1)
    spread = torch.linalg.solve_triangular(factor, phi_test.mT, upper=False).square().sum(0)
    forecast = Forecast.gaussian(mean, spread + noise, split.y_test.squeeze(1))
    return forecast, {"features": phi.shape[1], "weight_variance": alpha.item(), "noise_variance": noise.item()}


def exact_gp(
    split: RegressionSplit, most_rows: int, steps: int, generator: torch.Generator
) -> tuple[Forecast, dict[str, Any]]:
    """Regress by gpytorch's exact Gaussian process, a squared-exponential kernel with a length scale a feature.

    Args:
        split: The data.
        most_rows: Of more training rows so many are drawn.
        steps: Of Adam on the log marginal likelihood.
        generator: Draws the rows.
    """
    import gpytorch

    rows = torch.randperm(len(split.x_train), generator=generator)[:most_rows]
    x, y = split.x_train[rows], split.y_train[rows, 0]

    class Regression(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=x.shape[1]))

        def forward(self, inputs: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(inputs), self.covar_module(inputs))

    model = Regression().double()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=GP_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    exact = gpytorch.settings.fast_computations(False, False, False)
    with exact:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -evidence(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            parts = [model.likelihood(model(part)) for part in split.x_test.split(1000)]
            mean, variance = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "variance"))
    noise = model.likelihood.noise.item()
    facts = {"rows": len(rows), "log_evidence": -loss.item() * len(rows), "noise_variance": noise}
    return Forecast.gaussian(mean, variance, split.y_test.squeeze(1)), facts
