"""Closed-form targets: linear-Gaussian models whose posterior over z is known, and mistakes for power tests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_bdl.subspaces.log_joint import gaussian_log_prior

A = torch.tensor([[1.0, 0.5], [0.0, 1.5], [-1.0, 0.3], [0.4, 0.4]], dtype=torch.float64)
Y = torch.tensor([1.0, -0.5, 0.8, 2.0], dtype=torch.float64)


@dataclass
class LinearGaussian:
    """y = A z + N(0, noise² I), its likelihood over a temperature, and the prior N(0, prior_std² I)."""

    design: Tensor = field(default_factory=lambda: A)
    observed: Tensor = field(default_factory=lambda: Y)
    noise: float = 0.8
    temperature: float = 1.7
    prior_std: float = 1.3
    calls: int = 0

    @property
    def rank(self) -> int:
        return self.design.shape[1]

    def log_likelihood(self, z: Tensor) -> Tensor:
        self.calls += 1
        residuals = self.observed - z @ self.design.mT
        return -residuals.square().sum(-1) / (2 * self.noise**2 * self.temperature)

    def log_prior(self, z: Tensor) -> Tensor:
        return gaussian_log_prior(z, self.prior_std)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean (k,) and covariance (k, k)."""
        weight = 1 / (self.noise**2 * self.temperature)
        precision = weight * self.design.mT @ self.design + torch.eye(self.rank).double() / self.prior_std**2
        covariance = torch.linalg.inv(precision)
        return weight * covariance @ (self.design.mT @ self.observed), covariance

    def log_evidence(self) -> float:
        """Log of the integral of likelihood^(1/T) times prior, by completing the square."""
        mean, covariance = self.posterior()
        top = self.log_likelihood(mean) + self.log_prior(mean)
        return (top + torch.distributions.MultivariateNormal(mean, covariance).entropy() - self.rank / 2).item()


class ForgottenPrior(LinearGaussian):
    """What a sampler sees when the prior is left out of the log-joint."""

    def log_prior(self, z: Tensor) -> Tensor:
        return torch.zeros(z.shape[:-1], dtype=torch.float64) * z.sum(-1)


class TemperedPrior(LinearGaussian):
    """The temperature on the prior in place of the likelihood."""

    def log_likelihood(self, z: Tensor) -> Tensor:
        return super().log_likelihood(z) * self.temperature

    def log_prior(self, z: Tensor) -> Tensor:
        return super().log_prior(z) / self.temperature


class WrongScale(LinearGaussian):
    """A likelihood of batch means, say: too weak by a fifth."""

    def log_likelihood(self, z: Tensor) -> Tensor:
        return super().log_likelihood(z) * 0.8


class NoLikelihood(LinearGaussian):
    """The likelihood does not reach z."""

    def log_likelihood(self, z: Tensor) -> Tensor:
        return super().log_likelihood(z.detach() * 0) + 0 * z.sum(-1)


# a sampler that draws from N(0, prior_std² I) itself never sees log_prior: its prior goes wrong by its width
WRONG = {"prior": ForgottenPrior, "temperature": TemperedPrior, "scale": WrongScale, "likelihood": NoLikelihood}
