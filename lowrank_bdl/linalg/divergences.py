r"""KL divergences between Gaussians whatever operators their covariances are: exact, or refused.

Two precisions need no new formula: with :math:`\Sigma_p = S_p^{-1}` and :math:`\Sigma_q = S_q^{-1}`,
:math:`\mathrm{KL}(N(0, S_p^{-1}) \| N(0, S_q^{-1})) = \mathrm{KL}(N(0, S_q) \| N(0, S_p))`. A covariance and a
precision need :math:`\mathrm{tr}(S_q \Sigma_p)`, a sum of squares, and a precision and a covariance the trace of a
product of two inverses, by Woodbury's identity on both sides.
"""

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator, LowRankRootAddedDiagLinearOperator
from torch import Tensor

from lowrank_bdl.errors import NotPSDError, ShapeError
from lowrank_bdl.linalg import exact
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.capacitance import checked_cholesky
from lowrank_bdl.linalg.devices import require_float64
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.kl import kl_differentiable, kl_low_rank
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator, kl_kronecker
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.structured import StructuredLinearOperator, SumOfLinearOperators
from lowrank_bdl.linalg.transforms import transformed

LOST = 1e-6
"""Largest estimated error of a divergence between a covariance and a precision [nat, or relative above one nat]."""


def kl_gaussians(sigma_p: LinearOperator, sigma_q: LinearOperator, mean_p: Tensor, mean_q: Tensor) -> Tensor:
    r"""Return KL(N(m_p, Sigma_p) || N(m_q, Sigma_q)) [nat], shape ``(*B,)``, float64.

    Args:
        sigma_p: Covariance of p, any operator, shape ``(*B, D, D)``.
        sigma_q: Covariance of q.
        mean_p: Shape ``(*B, D)``.
        mean_q: Shape ``(*B, D)``.

    Raises:
        ShapeError: If the dimensions differ.
        NotPSDError: If a covariance has no density, or even float64 loses the result.
        NotImplementedError: If the two have no common structure and more than 800 dimensions.

    Cost: O(D (K_p + K_q)^2) for low-rank-plus-diagonal matrices and their inverses, in chunks; blockwise for equal
    blocks; O(D^3) for small matrices without structure.
    """
    if sigma_p.shape[-1] != sigma_q.shape[-1]:
        raise ShapeError(f"KL needs equal dimensions; got {sigma_p.shape[-1]} and {sigma_q.shape[-1]}.")
    shapes = (sigma_p.batch_shape, sigma_q.batch_shape, mean_p.shape[:-1], mean_q.shape[:-1])
    batch = torch.broadcast_shapes(*shapes)
    means = mean_p.expand(*batch, -1), mean_q.expand(*batch, -1)
    p, q = (_expanded(structured(sigma), batch) for sigma in (sigma_p, sigma_q))
    low_rank, inverse = LowRankPlusDiagLinearOperator, InverseLowRankPlusDiagLinearOperator
    if isinstance(p, low_rank) and isinstance(q, low_rank):
        return _kl_factors(p.factors, q.factors, *means)
    if isinstance(p, inverse) and isinstance(q, inverse):
        return _kl_precisions(p, q, *means)
    if isinstance(p, low_rank) and isinstance(q, inverse):
        return _kl_covariance_precision(p, q, *means)
    if isinstance(p, inverse) and isinstance(q, low_rank):
        return _kl_precision_covariance(p, q, *means)
    if isinstance(p, KroneckerSpectralLinearOperator) and isinstance(q, KroneckerSpectralLinearOperator):
        if p.eigenvalues.shape == q.eigenvalues.shape and p.has_bias == q.has_bias:
            return kl_kronecker(p, q, means[0].double() - means[1].double())
    if isinstance(p, BlockDiagonalLinearOperator) and isinstance(q, BlockDiagonalLinearOperator):
        if p.slices == q.slices:
            pairs = zip(p.blocks, q.blocks, p.slices, strict=True)
            parts = [kl_gaussians(a, b, *(mean[..., part] for mean in means)) for a, b, part in pairs]
            return torch.stack(parts).sum(0)
    return _kl_dense(p, q, *means)


def structured(covariance: LinearOperator) -> StructuredLinearOperator:
    """Return linear_operator's diagonal and low-rank-plus-diagonal classes as ours, its others as a sum of one term."""
    if isinstance(covariance, LowRankRootAddedDiagLinearOperator):
        return LowRankPlusDiagLinearOperator.from_linear_operator(covariance)
    if isinstance(covariance, DiagLinearOperator):
        diag = covariance._diagonal()
        return LowRankPlusDiagLinearOperator(diag.new_empty((*diag.shape, 0)), diag)
    return covariance if isinstance(covariance, StructuredLinearOperator) else SumOfLinearOperators(covariance)


def _expanded(sigma: StructuredLinearOperator, batch: torch.Size) -> LinearOperator:
    return sigma if sigma.batch_shape == batch else sigma._expand_batch(batch)


def _kl_factors(p: LowRankFactors, q: LowRankFactors, mean_p: Tensor, mean_q: Tensor) -> Tensor:
    require_float64(mean_p.device, "A KL divergence")
    tensors = (*vars(p).values(), *vars(q).values(), mean_p, mean_q)
    wants_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if wants_grad or transformed():
        return kl_differentiable(p, q, mean_p, mean_q)
    return kl_low_rank(p, q, mean_p, mean_q)


def _kl_precisions(
    p: InverseLowRankPlusDiagLinearOperator, q: InverseLowRankPlusDiagLinearOperator, mean_p: Tensor, mean_q: Tensor
) -> Tensor:
    """Return the divergence of two precisions: that of the two as covariances in reverse, and the means' part."""
    zero = torch.zeros_like(p.base.diag)
    divergence = _kl_factors(q.base.factors, p.base.factors, zero, zero)
    masses = (p.base.diag == 0) & (mean_p != mean_q)
    if transformed() or bool(masses.any()):
        masses = masses & ~(p.base._mixed_root() != 0).any(-1)
        divergence = divergence.masked_fill(masses.any(-1), torch.inf)
    return divergence + 0.5 * _quadratic(q.base, mean_p, mean_q)


def _quadratic(matrix: LinearOperator, mean_p: Tensor, mean_q: Tensor) -> Tensor:
    difference = (mean_p.double() - mean_q.double()).to(matrix.dtype)
    product = matrix.matmul(difference.unsqueeze(-1)).squeeze(-1)
    value: Tensor = (difference.double() * product).sum(-1)
    return value


def _kl_covariance_precision(
    p: LowRankPlusDiagLinearOperator, q: InverseLowRankPlusDiagLinearOperator, mean_p: Tensor, mean_q: Tensor
) -> Tensor:
    first, second = _without_point_masses(p), _without_point_masses(q.base)
    cross, trace = first.zeros(second.rank, first.rank), first.zeros()
    for part in first.chunks():
        own, other = first.mixed_rows(part, torch.float64), second.mixed_rows(part, torch.float64)
        d_p, d_q = first.diag[..., part].double(), second.diag[..., part].double()
        trace = trace + ((d_p + own.square().sum(-2)) * d_q + d_p * other.square().sum(-2)).sum(-1)
        cross = cross + other @ own.mT
    trace = trace + cross.square().sum((-2, -1))
    dim, logdets = p.shape[-1], p.logdet() + q.base.logdet()
    total = trace - dim + _quadratic(q.base, mean_p, mean_q) - logdets
    return _checked(0.5 * total, trace.detach() + dim + logdets.detach().abs())


def _kl_precision_covariance(
    p: InverseLowRankPlusDiagLinearOperator, q: LowRankPlusDiagLinearOperator, mean_p: Tensor, mean_q: Tensor
) -> Tensor:
    first, second = _without_point_masses(p.base), _without_point_masses(q)
    factors = (_cholesky(first), _cholesky(second))
    cross, trace, size = first.zeros(second.rank, first.rank), first.zeros(), first.zeros()
    for part in first.chunks():
        weights = [1 / matrix.diag[..., part].double() for matrix in (first, second)]
        own, other = (
            torch.linalg.solve_triangular(factor, matrix.mixed_rows(part, torch.float64), upper=False)
            * weight.unsqueeze(-2)
            for factor, matrix, weight in zip(factors, (first, second), weights, strict=True)
        )
        largest = weights[0] * weights[1]
        lost = weights[0] * other.square().sum(-2) + weights[1] * own.square().sum(-2)
        trace, size = trace + (largest - lost).sum(-1), size + largest.detach().sum(-1)
        cross = cross + other @ own.mT
    trace = trace + cross.square().sum((-2, -1))
    dim, logdets = q.shape[-1], q.logdet() + p.base.logdet()
    difference = (mean_p.double() - mean_q.double()).to(q.dtype)
    total = trace - dim + q.inv_quad(difference.unsqueeze(-1)) + logdets
    return _checked(0.5 * total, size + dim + logdets.detach().abs())


def _without_point_masses(sigma: LowRankPlusDiagLinearOperator) -> LowRankFactors:
    if bool((sigma.diag <= 0).any()):
        raise NotImplementedError(
            "the KL divergence between a covariance and a precision needs positive variances everywhere; got "
            f"{int((sigma.diag <= 0).sum())} entries of the diagonal that are not."
        )
    return sigma.factors


def _cholesky(factors: LowRankFactors) -> Tensor:
    gram = factors.zeros(factors.rank, factors.rank)
    for part in factors.chunks():
        rows = factors.mixed_rows(part, torch.float64)
        gram = gram + (rows / factors.diag[..., None, part].double()) @ rows.mT
    factor, amplification = checked_cholesky(gram)
    if not torch.finfo(torch.float64).eps * amplification < LOST:
        raise NotPSDError("the KL divergence needs variances that are not too far below the deviations.")
    return factor


def _checked(value: Tensor, size: Tensor) -> Tensor:
    """Return ``value`` unless the rounding of terms of this size is too much of it."""
    lost = torch.finfo(torch.float64).eps * size
    if bool((lost > LOST * value.detach().abs().clamp_min(1.0)).any()):
        raise NotPSDError(
            "the KL divergence between a covariance and a precision needs variances that are not too far below the "
            f"deviations; float64 leaves an error of about {lost.max().item():.0e} nat."
        )
    return value


def _kl_dense(p: LinearOperator, q: LinearOperator, mean_p: Tensor, mean_q: Tensor) -> Tensor:
    if p.shape[-1] > exact.DENSE_SIZE:
        raise NotImplementedError(
            f"the KL divergence between a {type(p).__name__} and a {type(q).__name__} has no exact form of their "
            f"structure, and is computed densely only up to {exact.DENSE_SIZE} dimensions; got {p.shape[-1]}."
        )
    factors = []
    for matrix in (p, q):
        factor, info = torch.linalg.cholesky_ex(matrix.to_dense().double())
        if bool(info.any()):
            raise NotPSDError("the KL divergence needs positive definite covariances; a pivot is not positive.")
        factors.append(factor)
    moved = torch.cat((factors[0], (mean_p.double() - mean_q.double()).unsqueeze(-1)), dim=-1)
    quadratic = torch.linalg.solve_triangular(factors[1], moved, upper=False).square().sum((-2, -1))
    logs = [factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) for factor in factors]
    result: Tensor = 0.5 * (quadratic - p.shape[-1]) + logs[1] - logs[0]
    return result
