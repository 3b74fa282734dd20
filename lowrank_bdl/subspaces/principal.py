"""Subspaces of a collected posterior: its principal directions, its raw columns, those of its whole covariance."""

from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.minka import minka_rank
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.principal_components import low_rank_components
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.swag import SWAG
from lowrank_bdl.subspaces.deviations import Deviations, deviations_of, posterior_of
from lowrank_bdl.subspaces.subspace import Subspace


@exact
def pca_subspace(
    source: SWAG | GaussianPosterior | Tensor,
    rank: int | float | Literal["mle"] | None = None,
    *,
    origin: Tensor | None = None,
    layout: ParameterLayout | None = None,
    orthonormal: bool = False,
) -> Subspace:
    r"""Return the subspace of the principal directions of deviations :math:`d_1, \dots, d_n`, uncentred.

    With :math:`U = (d_1, \dots, d_n) / \sqrt{n - 1} = Q S V^\top`, the basis is :math:`P = Q_k S_k`: for k = n,
    :math:`z \sim N(0, I)` is the low-rank law :math:`N(\hat\theta, U U^\top)` at scale 1, and for k < n the nearest
    one of rank k. Found as :math:`U V_k` through the n x n matrix :math:`U^\top U`; the only tensor of size D x k that
    is made is the result.

    Args:
        source: A collector; a posterior (the scale in its provenance is divided out, so that its scale is 1 here); or
            deviations as rows ``(n, D)``.
        rank: How many directions k; a share of the variance to explain, in (0, 1), by as few as will do; ``"mle"`` for
            Minka's choice; None for all, the numerical rank (one less than the iterates, where the first of them is
            among the n, as its deviation is zero).
        origin: For rows, what they deviate from, shape ``(D,)``.
        layout: For rows, what the coordinates are; None for plain vectors.
        orthonormal: Take :math:`P = Q_k` in place of :math:`Q_k S_k`.

    Returns:
        The subspace; its provenance has the rank and the share of variance explained.

    Raises:
        ShapeError: If there are no deviations, shapes do not agree, or ``rank`` is more than the numerical rank.
        ValueError: If ``rank`` is no such number.
        NonFiniteError: If a deviation is not finite.
        TypeError: If ``source`` is of another class, or ``origin`` does not go with it.
        StaleError: If the posterior shares deviations that its collector has changed since.

    Cost: two reads of the deviations, one write of the basis, O(D n (n + k)) time.

    Source: Izmailov et al. (UAI 2019), section 4.2, who find the same by a randomised SVD.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> plane = pca_subspace(rows, rank=1, origin=torch.zeros(3))
        >>> plane.lengths.tolist(), plane.provenance["explained_variance"]
        ([4.0], 0.64)
    """
    return principal_directions(deviations_of(source, origin, layout), rank, orthonormal, "pca")


def principal_directions(
    deviations: Deviations, rank: int | float | Literal["mle"] | None, orthonormal: bool, construction: str
) -> Subspace:
    """Return the subspace of the principal directions; see :func:`pca_subspace`."""
    factors, explained = deviations.factors, 0.0
    if isinstance(rank, str) and rank != "mle":
        raise ValueError(f'rank must be an integer, a share in (0, 1), "mle" or None; got {rank!r}.')
    if isinstance(rank, bool) or (isinstance(rank, float) and not 0 < rank < 1) or (isinstance(rank, int) and rank < 1):
        raise ValueError(f"rank must be an integer >= 1 or a share of the variance in (0, 1); got {rank}.")

    def choose(values: Tensor) -> int:
        nonlocal explained
        values = values.clamp_min(0)
        smallest = factors.rank * torch.finfo(torch.float64).eps * values[0]
        numerical = max(int((values > smallest).sum()), 1)
        if isinstance(rank, int):
            chosen = rank
        elif isinstance(rank, float):
            chosen = int((values.cumsum(0) < rank * values.sum()).sum()) + 1
        else:
            chosen = numerical if rank is None else minka_rank(values[:numerical], deviations.num_rows, factors.dim)
        if chosen > numerical:
            raise ShapeError(f"the deviations have numerical rank {numerical}; expected rank at most that, got {rank}.")
        explained = float(values[:chosen].sum() / values.sum())
        return chosen

    _, directions = low_rank_components(factors, choose, scaled=not orthonormal)
    return _subspace(
        deviations,
        directions,
        construction=construction,
        rank=directions.shape[-1],
        orthonormal=orthonormal,
        explained_variance=explained,
    )


@exact
def covariance_subspace(
    source: SWAG | GaussianPosterior | Tensor, *, origin: Tensor | None = None, layout: ParameterLayout | None = None
) -> Subspace:
    r"""Return the subspace of the raw columns of the covariance, :math:`P = (d_1, \dots, d_n) / \sqrt{n - 1}`.

    The same subspace as :func:`pca_subspace` with all directions, and the same law of :math:`z \sim N(0, I)`, in other
    coordinates: one a collected iterate.

    Args:
        source: As for :func:`pca_subspace`, as the other arguments.
        origin: See there.
        layout: See there.

    Raises:
        ShapeError: If there are no deviations, or their shapes do not agree.
        NonFiniteError: If a deviation is not finite.
        TypeError: As for :func:`pca_subspace`.
        StaleError: Likewise.

    Cost: one read of the deviations, one write of the basis, one read to check it.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> covariance_subspace(rows, origin=torch.zeros(2)).basis[:, 0]
        tensor([1.5000, 0.0000])
    """
    deviations = deviations_of(source, origin, layout)
    factors = deviations.factors
    basis = torch.empty(factors.rank, factors.dim, dtype=factors.diag.dtype, device=factors.diag.device)
    for part in factors.chunks():
        basis[:, part] = factors.mixed_rows(part, basis.dtype)
    return _subspace(deviations, basis.mT, check_finite=True, construction="covariance", rank=len(basis))


@exact
def principal_subspace(
    source: SWAG | GaussianPosterior,
    rank: int,
    *,
    orthonormal: bool = False,
    tol: float | None = None,
    generator: torch.Generator | None = None,
) -> Subspace:
    r"""Return the subspace of the top eigenvectors of the full covariance, its diagonal included, at scale 1.

    The basis is :math:`Q_k \Lambda_k^{1/2}`: :math:`z \sim N(0, I)` is the nearest law of rank k to
    :math:`N(\hat\theta, \Sigma)`.

    Args:
        source: A collector, or a posterior (the scale in its provenance is divided out).
        rank: k, from 1 to D.
        orthonormal: Take :math:`P = Q_k`.
        tol: Residual tolerance of Lanczos, relative to the largest variance.
        generator: Source of its start vector.

    Raises:
        ShapeError: If ``rank`` is out of range.
        NotConvergedError: If Lanczos did not reach its tolerance.
        TypeError: If ``source`` is of another class.
        StaleError: If the posterior shares deviations that its collector has changed since.

    Cost: two reads of the deviations for every product of Lanczos, and its basis.

    Example:
        >>> variance = torch.tensor([1.0, 9.0, 4.0])
        >>> axes = principal_subspace(GaussianPosterior.diagonal(torch.zeros(3), variance), 2)
        >>> axes.lengths.round(decimals=3).tolist()
        [3.0, 2.0]
    """
    posterior, scale = posterior_of(source)
    if rank < 1:
        raise ShapeError(f"rank must be at least 1; got {rank}.")
    values, directions = posterior.covariance.principal_components(rank, of="full", tol=tol, generator=generator)
    if not orthonormal:
        directions = directions * (values / scale).sqrt().to(directions.dtype)
    provenance = {
        "construction": "principal",
        "rank": rank,
        "orthonormal": orthonormal,
        "of": dict(posterior.provenance),
    }
    return Subspace(posterior.layout, posterior.mean, directions, provenance)


def _subspace(deviations: Deviations, basis: Tensor, check_finite: bool = False, **provenance: Any) -> Subspace:
    provenance["of"] = dict(deviations.provenance)
    return Subspace(deviations.layout, deviations.origin, basis, provenance, check_finite=check_finite)
