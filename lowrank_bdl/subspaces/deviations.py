"""What low-rank subspaces are made of: deviations from an origin, whoever holds them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.swag import SWAG


@dataclass(frozen=True)
class Deviations:
    r"""Columns :math:`U = R M`, scaled so that :math:`U U^\top` is their covariance at scale 1.

    Attributes:
        layout: Names and shapes of the coordinates, or None.
        origin: What they deviate from, shape ``(D,)`` [parameter].
        factors: U [parameter].
        num_rows: How many iterates made them, for the evidence of a rank.
        provenance: Of where they came from.
    """

    layout: ParameterLayout | None
    origin: Tensor
    factors: LowRankFactors
    num_rows: int
    provenance: Mapping[str, Any]


def posterior_of(source: SWAG | GaussianPosterior) -> tuple[GaussianPosterior, float]:
    """Return a posterior, sharing its tensors, and the scale that its covariance has been multiplied with.

    Raises:
        TypeError: If ``source`` is neither a collector nor a Gaussian posterior.
    """
    if isinstance(source, SWAG):
        return source.posterior(scale=1.0), 1.0
    if not isinstance(source, GaussianPosterior):
        raise TypeError(f"expected a SWAG or a GaussianPosterior; got {type(source).__name__}.")
    return source, float(source.provenance.get("scale", 1.0))


def deviations_of(
    source: SWAG | GaussianPosterior | Tensor, origin: Tensor | None, layout: ParameterLayout | None
) -> Deviations:
    r"""Return the deviations of a collector, of a posterior, or of a tensor of them; no copy.

    Args:
        source: A collector; a posterior, whose low-rank part is taken at scale 1 (the scale in its provenance is
            divided out); or deviations as rows ``(n, D)``, which are divided by :math:`\sqrt{\max(n - 1, 1)}`.
        origin: For rows, what they deviate from, shape ``(D,)``.
        layout: For rows, what the coordinates are.

    Raises:
        ShapeError: If there is no deviation, or shapes do not agree.
        TypeError: If ``source`` is of another class, rows lack their origin, or a posterior is given a second one.
    """
    if isinstance(source, Tensor):
        if origin is None:
            raise TypeError("deviations as a tensor need origin=, what they deviate from; got None.")
        if source.ndim != 2 or origin.shape != source.shape[1:] or not len(source):
            raise ShapeError(
                f"deviations must be (n, D) with n >= 1, and origin (D,); "
                f"got {tuple(source.shape)} and {tuple(origin.shape)}."
            )
        dtype = torch.promote_types(origin.dtype, torch.float32)
        mix = torch.tensor(1 / math.sqrt(max(len(source) - 1, 1)), dtype=torch.float64, device=origin.device)
        factors = LowRankFactors(source.detach().mT, origin.detach().to(dtype), mix)
        return Deviations(layout, factors.diag, factors, len(source), {"source": "rows"})
    if origin is not None or layout is not None:
        raise TypeError(f"origin and layout are for deviations as a tensor; a {type(source).__name__} has its own.")
    posterior, scale = posterior_of(source)
    factors = posterior.covariance.factors
    if factors.rank == 0:
        raise ShapeError("a subspace needs at least 1 deviation; the covariance is diagonal (rank 0).")
    factors = replace(factors, mix=factors.mix / math.sqrt(scale))
    rows = int(posterior.provenance.get("rows", factors.rank))
    return Deviations(posterior.layout, posterior.mean, factors, rows, posterior.provenance)
