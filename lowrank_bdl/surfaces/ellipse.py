"""The shadow of a Gaussian over all weights on a plane."""

import math
from typing import Protocol

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.dense_basis import DenseBasis
from lowrank_bdl.linalg.eigen import eigh_psd
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.surfaces.plane import Plane


class _Covariance(Protocol):
    def matmul(self, other: Tensor, /) -> Tensor: ...


class HasMoments(Protocol):
    """A posterior with a mean and a covariance that can be multiplied: ``GaussianPosterior``, ``BlockPosterior``."""

    @property
    def mean(self) -> Tensor:
        """Shape ``(D,)``."""

    @property
    def covariance(self) -> _Covariance:
        """D x D, every scale included."""


@exact
@torch.no_grad()
def projected_gaussian(plane: Plane, posterior: HasMoments) -> tuple[Tensor, Tensor]:
    r"""Return mean and covariance of the coordinates that weights from a Gaussian have on a plane.

    With the pseudo-inverse :math:`B^+` of the directions as columns, the coordinates of the nearest point of the plane,
    :math:`B^+ (\theta - \hat\theta)`, have mean :math:`B^+ (m - \hat\theta)` and covariance
    :math:`B^+ \Sigma B^{+\top}`.

    Args:
        plane: The plane.
        posterior: A Gaussian over the same weights.

    Returns:
        Shapes ``(2,)`` and ``(2, 2)``, float64.

    Raises:
        ShapeError: If posterior and plane are of different lengths.

    Cost: one product with the covariance, O(D K).
    """
    mean = posterior.mean
    if mean.shape != plane.origin.shape:
        raise ShapeError(f"plane and posterior must be of as many weights; got {len(plane.origin)} and {len(mean)}.")
    kernel = DenseBasis(plane.basis)
    products = posterior.covariance.matmul(plane.basis.to(mean.dtype))
    inner = kernel.inner_products(products.mT)
    half = torch.linalg.solve(plane.gram, inner)
    covariance = torch.linalg.solve(plane.gram, half.mT)
    return plane.project(mean.to(plane.origin.dtype)).double(), (covariance + covariance.mT) / 2


@exact
def swag_ellipse(plane: Plane, posterior: HasMoments, sigmas: float = 3.0, num: int = 200) -> Tensor:
    r"""Return the ellipse at so many standard deviations from the mean of a Gaussian, projected on a plane.

    Args:
        plane: The plane.
        posterior: A Gaussian over the same weights: SWAG's.
        sigmas: Mahalanobis distance from the mean, in the plane; 3 as published.
        num: Points on the ellipse, the last equal to the first.

    Returns:
        Coordinates, shape ``(num, 2)``, float64: draw them as a line. A point, or a line there and back, where the
        Gaussian has no extent in the plane.

    Raises:
        ValueError: If ``sigmas`` is not positive, or ``num`` < 2.
        ShapeError: If posterior and plane are of different lengths.

    Cost: one product with the covariance, O(D K).

    Source: Maddox et al. (2019), figure 3.

    Example:
        >>> from lowrank_bdl.posteriors.gaussian import GaussianPosterior
        >>> from lowrank_bdl.surfaces.plane import plane
        >>> gaussian = GaussianPosterior.diagonal(torch.ones(3), torch.tensor([4.0, 1.0, 9.0]))
        >>> e = torch.eye(3)
        >>> swag_ellipse(plane(torch.zeros(3), e[0], e[1]), gaussian, sigmas=2.0, num=3).round().tolist()
        [[5.0, 1.0], [-3.0, 1.0], [5.0, 1.0]]
    """
    if not 0 < sigmas < math.inf:
        raise ValueError(f"sigmas must be a positive number; got {sigmas}.")
    if num < 2:
        raise ValueError(f"num must be at least 2; got {num}.")
    mean, covariance = projected_gaussian(plane, posterior)
    values, vectors = eigh_psd(covariance)
    root = vectors * values.sqrt()
    steps = torch.arange(num, dtype=torch.float64, device=mean.device) % (num - 1)
    angles = 2 * math.pi * steps / (num - 1)
    return mean + sigmas * torch.stack([angles.cos(), angles.sin()], dim=-1) @ (root @ vectors.mT).mT
