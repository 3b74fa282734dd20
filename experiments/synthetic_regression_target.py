"""The posterior of all weights of a small perceptron, in units of the prior: one law for every method of a part."""

import math

import torch
from torch import Tensor

import lowrank_bdl as lb
from experiments.synthetic_regression_networks import evaluate
from lowrank_bdl.subspaces.log_joint import gaussian_log_prior


class AllWeights:
    """The log-joint of coordinates z = θ / s, with s the prior's standard deviation of each weight; what samplers need.

    The same law as :class:`lowrank_bdl.LogJoint` on the subspace with the diagonal basis s, without its cost a call,
    which is most of the time of a gradient of a few hundred weights.

    Args:
        layout: Of an `MLP` with one output.
        stddevs: s, shape (D,), float64.
        inputs: Shape (N, p), float64.
        targets: Shape (N,), float64.
        noise_variance: Of the Gaussian likelihood.

    Attributes:
        rank: D.
        prior_std: 1, of every coordinate.
    """

    prior_std = 1.0

    def __init__(
        self, layout: lb.ParameterLayout, stddevs: Tensor, inputs: Tensor, targets: Tensor, noise_variance: float
    ) -> None:
        self.layout, self.rank = layout, layout.numel
        self._stddevs, self._inputs, self._targets = stddevs, inputs, targets
        self._noise_variance = noise_variance

    def to_theta(self, z: Tensor) -> Tensor:
        """Return the weights (*S, D), float64."""
        return self._stddevs * z.double()

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Return the log-likelihood of all data at (S, D), shape (S,), float64."""
        errors = evaluate(self.layout, self.to_theta(z), self._inputs) - self._targets
        constant = 0.5 * len(self._targets) * math.log(2 * math.pi * self._noise_variance)
        return -0.5 * errors.square().sum(1) / self._noise_variance - constant

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of N(0, I) at (S, D), shape (S,), float64."""
        return gaussian_log_prior(z, self.prior_std)

    def sample_prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw weights, (count, D), float64."""
        return self.to_theta(torch.randn(count, self.rank, dtype=torch.float64, generator=generator))
