"""Controls: noise around given weights that no data were asked about."""

import math

import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior


@exact
def homoscedastic_noise(mean: Tensor, std: float, layout: ParameterLayout | None = None) -> GaussianPosterior:
    r"""Return :math:`N(m, \sigma^2 I)`: the same noise on every weight.

    Args:
        mean: :math:`m`, the weights, shape ``(D,)``; taken as float32 where they are narrower [parameter].
        std: :math:`\sigma > 0` [parameter].
        layout: Names and shapes of the weights.

    Raises:
        ValueError: If ``std`` is not a positive number.
        NonFiniteError: If a weight is not finite.

    Source: the HomoNoise baseline in the code of Maddox et al. (2019), there with std 0.01.

    Example:
        >>> homoscedastic_noise(torch.tensor([1.0, -2.0]), 0.5).stddev
        tensor([0.5000, 0.5000])
    """
    _check(std, "std")
    variance = torch.full_like(mean, std**2, dtype=_at_least_single(mean))
    return GaussianPosterior.diagonal(mean, variance, layout, {"source": "homoscedastic noise", "std": std})


@exact
def relative_noise(mean: Tensor, fraction: float, layout: ParameterLayout | None = None) -> GaussianPosterior:
    r"""Return the law of :math:`w + c |w| \epsilon`: noise in proportion to each weight.

    Its covariance is :math:`\mathrm{diag}((c w)^2)`; weights that are zero are point masses.

    Args:
        mean: :math:`w`, the weights, shape ``(D,)``; taken as float32 where they are narrower [parameter].
        fraction: :math:`c > 0`.
        layout: Names and shapes of the weights.

    Raises:
        ValueError: If ``fraction`` is not a positive number.
        NonFiniteError: If a weight is not finite.

    Example:
        >>> relative_noise(torch.tensor([1.0, -2.0, 0.0]), 0.25).stddev
        tensor([0.2500, 0.5000, 0.0000])
    """
    _check(fraction, "fraction")
    variance = (mean.to(_at_least_single(mean)) * fraction).square()
    return GaussianPosterior.diagonal(mean, variance, layout, {"source": "relative noise", "fraction": fraction})


def _at_least_single(mean: Tensor) -> torch.dtype:
    return torch.promote_types(mean.dtype, torch.float32)


def _check(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number; got {value}.")
