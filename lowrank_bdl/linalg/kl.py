r"""The Kullback-Leibler divergence between two low-rank-plus-diagonal Gaussians.

With :math:`\Sigma_p = D_p + U_p U_p^\top`, :math:`\Sigma_q = D_q + U_q U_q^\top`, :math:`W = D_q^{-1/2} U_q`,
:math:`C = I + W^\top W`, :math:`r = d_p / d_q`, :math:`h_i = w_i^\top C^{-1} w_i` and :math:`\Delta = m_p - m_q`,

.. math::
    2\,\mathrm{KL}(p \| q) = \sum_i (r_i - 1 - \log r_i) - \sum_i r_i h_i
    + \mathrm{tr}(U_p^\top \Sigma_q^{-1} U_p) + \Delta^\top \Sigma_q^{-1} \Delta + \log|C_q| - \log|C_p|.

Each coordinate of the first sum is taken in float64 from the difference :math:`d_p - d_q`, and the quadratic forms are
ridge residuals, so that nearly equal distributions of a million dimensions give nearly zero, not a rounding error of
the two log-determinants.
"""

import torch
from torch import Tensor

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg.capacitance import Capacitance, factorize
from lowrank_bdl.linalg.factors import LowRankFactors, inverse_std
from lowrank_bdl.linalg.plain import mixed_root
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.stiff import stiff_ridge
from lowrank_bdl.linalg.transforms import transformed

LOST = 1e-8
"""Largest estimated error of a divergence [nat, or relative to it above one nat] with which it is returned."""
RESIDUAL_TOLERANCE = 1e-10
"""Largest squared error, relative to the residual, that the Gram route may cause before the QR route is taken."""


@exact
def kl_low_rank(p: LowRankFactors, q: LowRankFactors, mean_p: Tensor, mean_q: Tensor) -> Tensor:
    r"""Return KL(p || q) [nat], shape ``(*B,)``, float64; infinite where p is not absolutely continuous to q.

    Args:
        p: Covariance of p, with batch shape ``*B``.
        q: Covariance of q, with batch shape ``*B``.
        mean_p: Shape ``(*B, D)``.
        mean_q: Shape ``(*B, D)``.

    Raises:
        NotPSDError: If a covariance has no density, or even float64 loses the result.

    Cost: two reads of each root and O(D (K_p + K_q)^2) time in float64; temporaries of a chunk.
    """
    wide = torch.float64
    cap_p, cap_q = factorize(p, least="double"), factorize(q, least="double")
    rank_p, columns_q = p.rank, q.root.shape[-1]
    log_ratio, cross = p.zeros(), p.zeros(columns_q, rank_p + 1)
    weighted, start = p.zeros(columns_q, columns_q), p.zeros()
    singular = torch.zeros(p.batch_shape, dtype=torch.bool, device=p.diag.device)
    for part in p.chunks():
        diag_p, diag_q = p.diag[..., part].to(wide), q.diag[..., part].to(wide)
        weight = inverse_std(diag_q, wide)
        columns = _columns(p, mean_p, mean_q, part) * weight.unsqueeze(-2)  # (*B, R_p + 1, n)
        rows = q.rows(part, wide) * weight.unsqueeze(-2)
        free = diag_q > 0
        difference = torch.where(free, (diag_p - diag_q) / torch.where(free, diag_q, 1.0), 0.0)
        log_ratio += (difference - torch.log1p(difference)).sum(-1)
        if cap_q.point_mass is not None:
            singular |= (~free & ((diag_p > 0) | _moved(p, mean_p, mean_q, part))).any(-1)
        cross += rows @ columns.mT
        weighted += (rows * (difference + free).unsqueeze(-2)) @ rows.mT
        start += columns.square().sum((-2, -1))
    weights = cap_q.solve(q.mix_transposed(cross))  # (*B, R_q, R_p + 1)
    quadratic, residual = _ridge_sum(p, q, mean_p, mean_q, weights)
    spread = max(1.0, cap_q.amplification)
    lost = torch.finfo(wide).eps ** 2 * spread * start > RESIDUAL_TOLERANCE * residual
    if cap_q.method == "qr" or bool((lost & (start > 0)).any()):
        every = torch.cat([_columns(p, mean_p, mean_q, part) for part in p.chunks()], dim=-1).mT
        quadratic = stiff_ridge(q, every)[0].sum(-1)
    leverage = cap_q.solve(q.mixed_gram(weighted)).diagonal(dim1=-2, dim2=-1).sum(-1)
    total = log_ratio - leverage + quadratic + _log_capacitance(cap_q) - _log_capacitance(cap_p)
    floor = torch.finfo(wide).eps ** 2 * start  # rounding the columns alone moves the squared residuals by this
    if bool(((floor > LOST * total.abs().clamp_min(1.0)) & ~singular).any()):
        raise NotPSDError(
            "the KL divergence needs variances that are not too far below the deviations; float64 leaves an error of "
            f"about {floor.max().item():.0e} nat. Raise the smallest variances with add_jitter()."
        )
    return (0.5 * total).masked_fill(singular, float("inf"))


def _columns(p: LowRankFactors, mean_p: Tensor, mean_q: Tensor, part: slice) -> Tensor:
    """Return the chunk of the columns of U_p and of the difference of the means, ``(*B, R_p + 1, n)``, float64."""
    difference = mean_p[..., part].double() - mean_q[..., part].double()
    return torch.cat((p.mixed_rows(part, torch.float64), difference.unsqueeze(-2)), dim=-2)


def _moved(p: LowRankFactors, mean_p: Tensor, mean_q: Tensor, part: slice) -> Tensor:
    """Say which coordinates p moves away from the mean of q by its low-rank part or its mean."""
    return (_columns(p, mean_p, mean_q, part) != 0).any(-2)


def _ridge_sum(
    p: LowRankFactors, q: LowRankFactors, mean_p: Tensor, mean_q: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum over columns y of ``|y - W z|^2 + |z|^2``, and the first term alone."""
    residual = p.zeros()
    inner = q.mix_forward(weights)
    for part in p.chunks():
        weight = inverse_std(q.diag[..., part], torch.float64).unsqueeze(-2)
        chunk = _columns(p, mean_p, mean_q, part) - inner.mT @ q.rows(part, torch.float64)
        residual += chunk.mul_(weight).square().sum((-2, -1))
    return residual + weights.square().sum((-2, -1)), residual


def _log_capacitance(capacitance: Capacitance) -> Tensor:
    return 2 * capacitance.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@exact
def kl_differentiable(p: LowRankFactors, q: LowRankFactors, mean_p: Tensor, mean_q: Tensor) -> Tensor:
    """Return KL(p || q) by plain differentiable float64 operations; for gradients, at the cost of D x K temporaries."""
    if not transformed():
        factorize(p), factorize(q)  # for their checks
    u_p, u_q = mixed_root(p), mixed_root(q)
    d_p, d_q = p.diag.double(), q.diag.double()
    moved = torch.cat((u_p, (mean_p.double() - mean_q.double()).unsqueeze(-1)), dim=-1)
    apart = (((d_p == 0) & (d_q > 0)) | ((d_q == 0) & ((d_p > 0) | (moved != 0).any(-1)))).any(-1)
    common = (d_p == 0) | (d_q == 0)  # point masses of both, else the result is infinite: left out
    d_p, d_q = d_p.masked_fill(common, 1.0), d_q.masked_fill(common, 1.0)
    scaled = u_q / d_q.sqrt().unsqueeze(-1)
    columns = moved.masked_fill(common.unsqueeze(-1), 0.0) / d_q.sqrt().unsqueeze(-1)
    identity = torch.eye(u_q.shape[-1], dtype=torch.float64, device=d_q.device)
    cholesky = torch.linalg.cholesky(identity + scaled.mT @ scaled)
    weights = torch.cholesky_solve(scaled.mT @ columns, cholesky)
    quadratic = (columns - scaled @ weights).square().sum((-2, -1)) + weights.square().sum((-2, -1))
    leverage = torch.linalg.solve_triangular(cholesky, scaled.mT, upper=False).square().sum(-2)
    other = u_p / d_p.sqrt().unsqueeze(-1)
    cholesky_p = torch.linalg.cholesky(
        torch.eye(u_p.shape[-1], dtype=torch.float64, device=d_p.device) + other.mT @ other
    )
    excess = (d_p - d_q) / d_q
    log_det: Tensor = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = log_det - cholesky_p.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    ratio: Tensor = (excess - excess.log1p() - (1 + excess) * leverage).sum(-1)
    return (0.5 * (ratio + quadratic) + log_det).masked_fill(apart, float("inf"))
