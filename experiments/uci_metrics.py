"""How good predicted distributions of one number each are, in the unit of the file and normalised."""

import math
from dataclasses import dataclass

from torch import Tensor

import lowrank_bdl as lb

NORMAL_QUANTILE = 1.959963984540054  # 97.5 %


@dataclass(frozen=True)
class Forecast:
    """Predictions of N normalised targets, float64.

    Attributes:
        mean: Shape (N,).
        variance: Of the predicted distribution, that of the weights included, (N,).
        log_likelihood: Log-density of the distribution at the targets, (N,) [nat].
        targets: Shape (N,).
    """

    mean: Tensor
    variance: Tensor
    log_likelihood: Tensor
    targets: Tensor

    @classmethod
    def of(cls, found: lb.Predictive) -> "Forecast":
        """Return what a model average predicts."""
        assert found.targets is not None
        parts = (found.mean, found.variance, found.log_likelihood, found.targets)
        return cls(*(part.double().flatten() for part in parts))

    @classmethod
    def gaussian(cls, mean: Tensor, variance: Tensor, targets: Tensor) -> "Forecast":
        """Return predictions that are Gaussian."""
        return cls(mean, variance, gaussian_log_density(targets, mean, variance), targets)


def gaussian_log_density(targets: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((targets - mean).square() / variance + variance.log() + math.log(2 * math.pi))


def metrics_of(forecast: Forecast, std: float) -> dict[str, float]:
    """Return means over the examples.

    Args:
        forecast: For normalised targets.
        std: What targets were divided by [unit of the file].

    Returns:
        ``log_likelihood``: of the predicted distribution (of a model average: the mixture), in the unit of the file;
        ``gaussian_log_likelihood``: of the Gaussian with its mean and variance, as published; both also of the
        normalised targets, as ``normalized_...``; ``rmse`` [unit of the file]; ``coverage``: share of the targets in
        that Gaussian's central 95 %.
    """
    error = forecast.targets - forecast.mean
    matched = gaussian_log_density(forecast.targets, forecast.mean, forecast.variance)
    own, gaussian = forecast.log_likelihood.mean().item(), matched.mean().item()
    inside = error.abs() <= NORMAL_QUANTILE * forecast.variance.sqrt()
    return {
        "log_likelihood": own - math.log(std),
        "gaussian_log_likelihood": gaussian - math.log(std),
        "normalized_log_likelihood": own,
        "normalized_gaussian_log_likelihood": gaussian,
        "rmse": std * error.square().mean().sqrt().item(),
        "coverage": inside.double().mean().item(),
    }
