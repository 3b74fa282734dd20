r"""Low-rank-plus-diagonal matrices by plain differentiable torch operations in float64.

The path for derivatives beyond the first, for torch.func, forward-mode differentiation and torch.compile; all else
takes the kernels, which are faster and hold no second D x K tensor. The formulas are those of the kernels (`ridge.py`,
`capacitance.py`, `roots.py`): the quadratic form is a ridge residual, so that no large numbers are subtracted.

Nothing here looks at a number. What the kernels refuse (a negative variance, a zero variance under a non-zero root, a
matrix that float64 loses) comes out as NaN.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.linalg.devices import require_float64
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.linalg.matrix_sqrt import symmetric_sqrt

LOGDET_TOLERANCE = 1e-3
"""Largest estimated error of log|C| [nat] in float64; NaN above it."""
SOLVE_TOLERANCE = 1e-3
"""Largest estimated relative error of a solve in float64; NaN above it."""


@dataclass(frozen=True)
class _Whitened:
    """W = D^-1/2 U, the Cholesky factor L of C = I + W'W, and what keeps them from being right; float64."""

    std: Tensor  # D^1/2, one at point masses, (*B, D)
    free: Tensor  # coordinates that are no point masses, (*B, D)
    weighted: Tensor  # W, (*B, D, R)
    cholesky: Tensor  # L, (*B, R, R)
    amplification: Tensor  # of rounding errors, (*B,)
    refused: Tensor  # (*B,), bool


def mixed_root(factors: LowRankFactors) -> Tensor:
    """Return ``R M``, shape ``(*B, D, R)``, float64."""
    require_float64(factors.diag.device, "A higher derivative, and what torch.func or torch.compile transform,")
    root = factors.rows(slice(0, factors.dim), torch.float64).mT
    mix = factors.mix.double()
    return root @ mix if mix.ndim else root * mix


def num_free(factors: LowRankFactors) -> Tensor:
    """Return how many coordinates are no point masses, shape ``(*B,)``, float64."""
    return (factors.diag != 0).sum(-1).double()


def matmul(factors: LowRankFactors, columns: Tensor) -> Tensor:
    """Return ``Sigma X``, shape ``(*B, D, S)``."""
    mixed, wide = mixed_root(factors), columns.double()
    product = factors.diag.double().unsqueeze(-1) * wide + mixed @ (mixed.mT @ wide)
    return product.to(factors.diag.dtype)


def diagonal(factors: LowRankFactors) -> Tensor:
    """Return the diagonal of Sigma, shape ``(*B, D)``."""
    return (factors.diag.double() + mixed_root(factors).square().sum(-1)).to(factors.diag.dtype)


def solve(factors: LowRankFactors, columns: Tensor) -> Tensor:
    """Return ``Sigma^-1 X``, shape ``(*B, D, S)``."""
    white = _whiten(factors)
    side, residual, _ = _residual(white, columns.double())
    solution = residual / white.std.unsqueeze(-1)
    lost = _lost(white, side / white.std.unsqueeze(-1), solution)
    refused = (white.refused.unsqueeze(-1) | (lost > SOLVE_TOLERANCE)).unsqueeze(-2)
    return solution.masked_fill(refused, math.nan).to(factors.diag.dtype)


def inv_quad_logdet(factors: LowRankFactors, columns: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``x' Sigma^-1 x`` for columns x minus the mean, ``(*B, S)``, and log|Sigma|, ``(*B,)``, float64."""
    white = _whiten(factors)
    centred = columns.double() if mean is None else columns.double() - mean.double().unsqueeze(-1)
    side, residual, weights = _residual(white, centred)
    quadratic = residual.square().sum(-2) + weights.square().sum(-2)
    off = (~white.free.unsqueeze(-1) & (centred != 0)).any(-2)
    lost = _lost(white, side, torch.cat((residual, weights), dim=-2))
    refused = white.refused.unsqueeze(-1) | (lost > SOLVE_TOLERANCE)
    quadratic = quadratic.masked_fill(off, math.inf).masked_fill(refused, math.nan)
    log_std: Tensor = white.std.log().sum(-1) + white.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return quadratic, (2 * log_std).masked_fill(white.refused, math.nan)


def inverse_diagonal(factors: LowRankFactors) -> Tensor:
    """Return the diagonal of ``Sigma^-1``, zero at point masses, shape ``(*B, D)``."""
    white = _whiten(factors)
    rows = torch.linalg.solve_triangular(white.cholesky, white.weighted.mT, upper=False)
    kept = (1 - rows.square().sum(-2)) / white.std.square()
    result = torch.where(white.free, kept, 0.0).masked_fill(white.refused.unsqueeze(-1), math.nan)
    return result.to(factors.diag.dtype)


def root_matmul(factors: LowRankFactors, columns: Tensor, inverse: bool, transposed: bool) -> Tensor:
    """Multiply ``columns`` (*B, D, S) by the root R of Sigma, or T of its inverse, or by their transposes."""
    white = _whiten(factors)
    identity = _identity(white.cholesky)
    root = symmetric_sqrt(identity + white.weighted.mT @ white.weighted)
    inner = torch.linalg.inv(root @ root + root if inverse else identity + root)
    free = white.free.double()  # point masses have a standard deviation of zero
    scale = (free / white.std if inverse else free * white.std).unsqueeze(-1)
    chunk = columns.double() * scale if transposed else columns.double()
    low_rank = white.weighted @ (inner @ (white.weighted.mT @ chunk))
    result: Tensor = chunk - low_rank if inverse else chunk + low_rank
    result = result if transposed else result * scale
    return result.masked_fill(white.refused[..., None, None], math.nan).to(factors.diag.dtype)


def _whiten(factors: LowRankFactors) -> _Whitened:
    diag, mixed = factors.diag.double(), mixed_root(factors)
    free = diag != 0
    std = torch.where(free, diag, 1.0).sqrt()
    weighted = torch.where(free.unsqueeze(-1), mixed, 0.0) / std.unsqueeze(-1)
    capacitance = _identity(weighted.mT @ weighted) + weighted.mT @ weighted
    cholesky, info = torch.linalg.cholesky_ex(capacitance)
    refused = (info != 0) | ~((diag >= 0) & diag.isfinite()).all(-1)
    refused = refused | (~free & (mixed.detach() != 0).any(-1)).any(-1)
    amplification = torch.zeros_like(std[..., :1].sum(-1)).detach()
    if factors.rank:
        triangle = cholesky.detach()
        unit = triangle / triangle.square().sum(-1, keepdim=True).sqrt()
        inverse = torch.linalg.solve_triangular(unit, _identity(unit).expand_as(unit), upper=False)
        amplification = (inverse.mT @ inverse).square().sum((-2, -1)).sqrt()
        refused = refused | ~(4 * torch.finfo(torch.float64).eps * amplification < LOGDET_TOLERANCE)
    return _Whitened(std, free, weighted, cholesky, amplification, refused)


def _residual(white: _Whitened, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the ridge residual y - W z, both ``(*B, D, S)``, and z, ``(*B, R, S)``."""
    side = torch.where(white.free.unsqueeze(-1), columns, 0.0) / white.std.unsqueeze(-1)
    weights = torch.cholesky_solve(white.weighted.mT @ side, white.cholesky)
    return side, side - white.weighted @ weights, weights


def _lost(white: _Whitened, before: Tensor, after: Tensor) -> Tensor:
    """Return the estimated relative error of what is left of ``before`` after a projection was taken off, (*B, S)."""
    start, left = before.detach().square().sum(-2), after.detach().square().sum(-2)
    ratio = torch.where(start > 0, start / left, 0.0).sqrt()
    return 8 * torch.finfo(torch.float64).eps * white.amplification.clamp_min(1.0).sqrt().unsqueeze(-1) * ratio


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=torch.float64, device=like.device)
