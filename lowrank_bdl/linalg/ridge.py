r"""Solves and quadratic forms as ridge residuals.

For one vector x let :math:`y = D^{-1/2} x` and :math:`W = D^{-1/2} R M`. Then

.. math:: x^\top \Sigma^{-1} x = \min_z \|y - W z\|^2 + \|z\|^2, \qquad \Sigma^{-1} x = D^{-1/2} (y - W z),

with :math:`z = C^{-1} W^\top y`: two reads of the root and no subtraction of large numbers, which is where the Woodbury
form :math:`\|y\|^2 - z^\top W^\top y` loses everything. What rounding is left grows with eps times the norm of
y over the norm of the residual. Both are at hand, so the error is bounded after every pass, and a pass whose bound is
too large is redone in float64, or by a QR factorisation with sorted rows.

Where the compiled kernels sum :math:`W^\top y` and C, and x is not much longer than a draw, the subtraction loses next
to nothing, and one read is enough: the Woodbury form is taken if its own error estimate is below the same tolerance.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.capacitance import Capacitance, Projection, factorize
from lowrank_bdl.linalg.devices import in_dtype, sum_in_float64, to_float64
from lowrank_bdl.linalg.factors import LowRankFactors, inverse_std, inverse_variance, multiply, only_column
from lowrank_bdl.linalg.kernels import lift_
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.stiff import stiff_ridge

QUADRATIC_TOLERANCE = 1e-6
"""Largest estimated relative error of a quadratic form; second order in the error of z."""
SOLVE_TOLERANCE = 1e-5
"""Largest estimated relative error of a solve that the storage dtype may cause; first order in the error of z."""
STIFF_SOLVE_TOLERANCE = 1e-3
"""Largest estimated relative error with which a solve is returned at all."""


@dataclass(frozen=True)
class Ridge:
    r"""Solutions for S right-hand sides.

    Attributes:
        quadratic: :math:`x^\top \Sigma^{-1} x`, shape ``(*B, S)``, float64; infinite off the value of a point mass.
        weights: :math:`z = (R M)^\top \Sigma^{-1} x`, shape ``(*B, R, S)``, float64.
        solution: :math:`\Sigma^{-1} x`, shape ``(*B, D, S)``, in the storage dtype, or None if it was not asked for.
        capacitance: The factorisation that was used, a finer one than was given where that one did not suffice.
    """

    quadratic: Tensor
    weights: Tensor
    solution: Tensor | None
    capacitance: Capacitance


@dataclass(frozen=True)
class _Residual:
    """What one pass over the residual ``r = y - W z`` leaves: sums over D in float64, each of shape ``(*B, S)``."""

    square: Tensor  # ||r||^2
    solution: Tensor | None  # D^-1/2 r
    solution_square: Tensor  # ||D^-1/2 r||^2
    solution_start: Tensor  # ||D^-1/2 y||^2


@exact
def ridge(
    factors: LowRankFactors,
    capacitance: Capacitance,
    columns: Tensor,
    *,
    mean: Tensor | None = None,
    solve: bool = False,
    projection: Projection | None = None,
) -> Ridge:
    r"""Solve for ``columns`` minus ``mean``, in the cheapest arithmetic whose error bound is good enough.

    Args:
        factors: The matrix.
        capacitance: Its factorisation.
        columns: Right-hand sides x, shape ``(*B, D, S)``.
        mean: Subtracted from every column chunk by chunk, so that no D x S difference is formed; ``(*B, D)``.
        solve: Whether to return :math:`\Sigma^{-1} x` too.
        projection: That of the only column, if the factorisation took it along.

    Raises:
        NotPSDError: If ``solve`` is asked for and even float64 loses it: the variances of some coordinates are too
            far below their deviations.

    Cost: two reads of the root, or one for a quadratic form by the compiled kernels; O(D K S) time; repeated in float64
    where the bound asks for it.
    """
    for dtype in dict.fromkeys((factors.diag.dtype, torch.float64)):
        if dtype is torch.float64 and capacitance.method == "storage" and factors.diag.dtype is not dtype:
            capacitance = factorize(factors, least="double")
        if capacitance.method == "qr" or (capacitance.method == "double" and dtype is not torch.float64):
            continue
        if projection is not None and projection.sums is not None:
            inner, start = projection.sums[:-1].unsqueeze(-1), projection.sums[-1:]
            projection = None  # it is of the arithmetic of the factorisation, the first one that is tried
        else:
            inner, start = _weighted_projection(factors, capacitance, columns, mean, dtype)
        projected = factors.mix_transposed(inner)
        weights = capacitance.solve(projected)
        solution = None
        if not solve and factors.mix.ndim == 0 and factors.compiled(only_column(columns), mean):
            quadratic = start - (projected * weights).sum(-2)
            lost = _subtraction_error(start, weights, capacitance, compiled.rounding(factors.dim, dtype))
            if bool((lost <= QUADRATIC_TOLERANCE * quadratic).all()):
                break  # a Gram matrix and a projection of this precision leave nothing for a second pass to mend
        residual = _residual(factors, capacitance, weights, columns, mean, dtype, solve)
        quadratic, solution = residual.square + weights.square().sum(-2), residual.solution
        if _error(start, quadratic, residual if solve else None, capacitance, factors, dtype) < 1.0:
            break
    else:
        wide = to_float64(columns)
        centred = wide if mean is None else wide - to_float64(mean).unsqueeze(-1)
        quadratic, weights = stiff_ridge(factors, centred)
        residual = _residual(factors, capacitance, weights, columns, mean, torch.float64, solve)
        solution = residual.solution
        lost = torch.finfo(torch.float64).eps * _ratio(residual.solution_start, residual.solution_square)
        if solve and bool((lost > STIFF_SOLVE_TOLERANCE).any()):
            raise NotPSDError(
                "a solve needs variances that are not too far below the deviations; here float64 leaves a relative "
                f"error of about {lost.max().item():.0e} (expected at most {STIFF_SOLVE_TOLERANCE:.0e}). Raise the "
                f"smallest variances, {factors.diag[factors.diag > 0].min().item():.1e} and up, with add_jitter()."
            )
    if capacitance.point_mass is not None:
        off = columns != (0 if mean is None else mean.unsqueeze(-1))
        off = (off & capacitance.point_mass.unsqueeze(-1)).any(-2)
        quadratic = quadratic.masked_fill(off.to(quadratic.device), math.inf)
    return Ridge(quadratic, weights, solution, capacitance)


def _subtraction_error(start: Tensor, weights: Tensor, capacitance: Capacitance, rounding: float) -> Tensor:
    r"""Return the estimated error of :math:`\|y\|^2 - z^\top W^\top y` for a scalar mix, shape ``(S,)``.

    The relative errors ``rounding`` of the sums :math:`y^\top y, w_i^\top y, w_i^\top w_j`, independent of each other,
    enter by :math:`\|y\|^2 + 2 \|y\| t + t^2` with :math:`t^2 = \sum_i z_i^2 \|w_i\|^2`.
    """
    norms = capacitance.gram.diagonal().clamp_min(0).unsqueeze(-1)
    moved = (weights.square() * norms).sum(-2)
    return rounding * (start.sqrt() + moved.sqrt()).square()


def _error(
    start: Tensor,
    quadratic: Tensor,
    solved: _Residual | None,
    capacitance: Capacitance,
    factors: LowRankFactors,
    dtype: torch.dtype,
) -> float:
    """Return the estimated error of a pass in ``dtype`` as a multiple of its tolerance; NaN columns count as none.

    Args:
        start: The squared norms of y.
        quadratic: The squared norms of the ridge residuals.
        solved: The residual pass, if its solution is wanted.
        capacitance: The factorisation used.
        factors: The matrix.
        dtype: Of the products.
    """
    if quadratic.numel() == 0:
        return 0.0
    eps = 8 * torch.finfo(dtype).eps
    spread = math.sqrt(max(1.0, capacitance.amplification))
    ratio = eps * _ratio(start, quadratic)
    error = ((ratio * spread).square() + ratio / math.sqrt(factors.dim)) / QUADRATIC_TOLERANCE
    if solved is not None:
        lost = eps * spread * _ratio(solved.solution_start, solved.solution_square)
        error = torch.maximum(error, lost / SOLVE_TOLERANCE)
    if dtype is torch.float64:  # a right-hand side that holds NaN or infinity gains nothing by another method
        error = torch.where(start.isfinite(), error, 0.0)
    return torch.where(error.isfinite(), error, math.inf).max().item()


def _ratio(large: Tensor, small: Tensor) -> Tensor:
    """Return the root of ``large / small``, and zero where ``large`` is zero."""
    return torch.where(large > 0, large / small, 0.0).sqrt()


def _residual(
    factors: LowRankFactors,
    capacitance: Capacitance,
    weights: Tensor,
    columns: Tensor,
    mean: Tensor | None,
    dtype: torch.dtype,
    solve: bool,
) -> _Residual:
    """Pass over the residual for given weights z, with products in ``dtype``."""
    count = columns.shape[-1]
    inner = factors.mix_forward(weights)
    vector = only_column(columns)
    if vector is not None and factors.compiled(vector, mean):
        sums, quotient = compiled.residual(factors.root, factors.diag, vector, mean, inner[:, 0], dtype, solve)
        return _Residual(sums[:1], None if quotient is None else quotient.unsqueeze(-1), sums[1:2], sums[2:])
    inner = in_dtype(inner, dtype, factors.diag.device)
    square, solution_square, solution_start = (factors.zeros(count) for _ in range(3))
    solution = None
    if solve:
        shape = (*factors.batch_shape, factors.dim, count)
        solution = torch.empty(shape, dtype=factors.diag.dtype, device=factors.diag.device)
    for part in factors.chunks(max(1, count), dtype):
        scale = inverse_std(factors.diag[..., part], dtype, capacitance.point_mass is not None).unsqueeze(-1)
        chunk = _centre(columns, mean, part, dtype)
        if solution is not None:
            solution_start += sum_of_squares((chunk * scale).mul_(scale))
        chunk = lift_(chunk, factors.rows(part, dtype), inner, sign=-1.0).mul_(scale)
        square += sum_of_squares(chunk)
        if solution is not None:
            solution[..., part, :] = chunk.mul_(scale)
            solution_square += sum_of_squares(chunk)
    return _Residual(square, solution, solution_square, solution_start)


def _weighted_projection(
    factors: LowRankFactors, capacitance: Capacitance, columns: Tensor, mean: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`R^\top D^{-1} x`, ``(*B, K, S)``, and :math:`\|D^{-1/2} x\|^2`, ``(*B, S)``, both float64.

    Products are taken in ``dtype``; the norm is for error bounds alone and summed in ``dtype`` within a chunk.
    """
    vector = only_column(columns)
    if vector is not None and factors.compiled(vector, mean):
        sums = compiled.project(factors.root, factors.diag, vector, mean, dtype)
        return sums[:-1].unsqueeze(-1), sums[-1:]
    total = factors.zeros(factors.root.shape[-1], columns.shape[-1])
    norm = factors.zeros(columns.shape[-1])
    masses = capacitance.point_mass is not None
    for part in factors.chunks(max(1, columns.shape[-1]), dtype):
        weight = inverse_variance(factors.diag[..., part], dtype, masses).unsqueeze(-1)
        chunk = in_dtype(columns[..., part, :], dtype) if mean is None else _centre(columns, mean, part, dtype)
        weighted = chunk * weight
        total += to_float64(multiply(factors.rows(part, dtype), weighted))
        norm += to_float64(torch.linalg.vecdot(weighted, chunk, dim=-2))
    return total, norm


def sum_of_squares(columns: Tensor) -> Tensor:
    """Return the sum over the second-last axis of the squares: products in the dtype given, the sum in float64."""
    return sum_in_float64(columns.square(), -2)


def _centre(columns: Tensor, mean: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    """Return a fresh chunk of ``columns - mean``, subtracted in ``dtype``."""
    chunk = columns[..., part, :]
    if mean is None:
        fresh = in_dtype(chunk, dtype)
        return fresh.clone() if fresh is chunk else fresh
    return in_dtype(chunk, dtype) - in_dtype(mean[..., part, None], dtype)
