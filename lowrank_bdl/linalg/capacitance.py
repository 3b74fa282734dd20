r"""Factorisation of low-rank-plus-diagonal matrices: the K x K capacitance matrix, its checks and its log-determinant.

With :math:`W = D^{-1/2} R M` and :math:`C = I + W^\top W = L L^\top` (Woodbury; Golub & Van Loan, Matrix Computations,
4th ed., 2.1.4), :math:`\log|\Sigma| = \sum_i \log d_i + \log|C|`. C is first summed from products in the storage
dtype. The error this can cause is bounded by eps times the norm of the inverse of C scaled to a unit diagonal; where
that is too much the sum is redone in float64, and where even float64 loses the answer (a few coordinates whose
variance is many orders below the rest) L comes from a QR factorisation with sorted rows instead (`stiff.py`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, NotPSDError
from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.devices import to_float64
from lowrank_bdl.linalg.factors import LowRankFactors, gram
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.stiff import stiff_triangle

LOGDET_TOLERANCE = 1e-3
"""Largest estimated error of log|C| [nat] that the storage dtype may cause."""


class ZeroVarianceError(NotPSDError):
    """Variances are zero under a root that is not: a factorisation needs them positive, the matrix itself may not."""


@dataclass(frozen=True)
class Capacitance:
    r"""A factorised low-rank-plus-diagonal matrix; a value that one holds, valid while its inputs are unchanged.

    Attributes:
        cholesky: Lower-triangular :math:`L` with :math:`L L^\top = I + W^\top W`, ``(*B, R, R)``, float64.
        gram: :math:`W^\top W`, ``(*B, R, R)``, float64 (:math:`L L^\top - I` where ``method`` is ``"qr"``).
        logdet: :math:`\log|\Sigma|` over the free coordinates, ``(*B,)``, float64 [nat].
        num_free: Coordinates that are not point masses, ``(*B,)``, float64.
        point_mass: Coordinates with zero variance and zero deviation, ``(*B, D)`` bool, or None if there are none.
        amplification: Norm of the inverse of the unit-diagonal C: what rounding errors are multiplied by.
        method: ``"storage"``, ``"double"`` or ``"qr"``: how L was found.
    """

    cholesky: Tensor
    gram: Tensor
    logdet: Tensor
    num_free: Tensor
    point_mass: Tensor | None
    amplification: float
    method: str

    def solve(self, columns: Tensor) -> Tensor:
        """Return :math:`C^{-1} x` for ``columns`` x of shape ``(*B, R, S)``, float64."""
        return torch.cholesky_solve(columns, self.cholesky)


@dataclass
class Projection:
    r"""A projection :math:`R^\top D^{-1} (x - m)` for a factorisation to take along when it reads the root anyway.

    Attributes:
        vector: x, shape ``(D,)``.
        mean: m, shape ``(D,)``, or None for zero.
        sums: The K numbers and :math:`\|D^{-1/2} (x - m)\|^2`, ``(K + 1,)``, float64; None where they were not taken.
    """

    vector: Tensor
    mean: Tensor | None
    sums: Tensor | None = None


@exact
def factorize(factors: LowRankFactors, least: str = "storage", projection: Projection | None = None) -> Capacitance:
    """Factorise the matrix, in the cheapest way whose error bound is good enough.

    Args:
        factors: The matrix; ``diag`` must be >= 0, and a coordinate with zero diagonal must have a zero root.
        least: ``"storage"``, or ``"double"`` to sum C from float64 products at once.
        projection: Filled in, with the products of the same dtype, where the compiled kernels can.

    Raises:
        NotPSDError: If diagonal entries are negative, or zero under a non-zero root; the message has the count.
        NonFiniteError: If the diagonal or the root holds NaN or infinity.

    Cost: one read of the root and O(D K^2) time; twice to ten times that where the checks ask for more precision.
    """
    factors = LowRankFactors(*(None if t is None else t.detach() for t in vars(factors).values()))  # type: ignore[arg-type]
    log_diag, clean = _scan(factors)
    point_mass = None if clean else _point_masses(factors)
    zeros = factors.zeros() if point_mass is None else point_mass.sum(-1)
    num_free = factors.dim - to_float64(zeros)
    for dtype in (torch.float64,) if least == "double" else dict.fromkeys((factors.diag.dtype, torch.float64)):
        mixed = factors.mixed_gram(_gram(factors, dtype, point_mass is not None, projection))
        cholesky, amplification = checked_cholesky(mixed)
        if 4 * torch.finfo(dtype).eps * amplification < LOGDET_TOLERANCE:
            method = "double" if dtype is torch.float64 else "storage"
            break
    else:
        if not bool(mixed.isfinite().all()):
            raise NonFiniteError("the root must be finite everywhere; its Gram matrix holds NaN or infinity.")
        cholesky, method = stiff_triangle(factors), "qr"
        if projection is not None:
            projection.sums = None
        mixed = cholesky @ cholesky.mT - torch.eye(factors.rank, dtype=torch.float64, device=cholesky.device)
        amplification = math.inf
    logdet = log_diag + 2 * cholesky.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return Capacitance(cholesky, mixed, logdet, num_free, point_mass, amplification, method)


def checked_cholesky(mixed: Tensor) -> tuple[Tensor, float]:
    """Return the Cholesky factor of ``I + mixed`` and the error amplification, infinite where it failed."""
    capacitance = mixed + torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
    scale = capacitance.diagonal(dim1=-2, dim2=-1).rsqrt()
    unit, info = torch.linalg.cholesky_ex(scale.unsqueeze(-1) * capacitance * scale.unsqueeze(-2))
    if mixed.numel() == 0:
        return unit, 0.0
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    inverse = torch.linalg.solve_triangular(unit, eye, upper=False)  # asks nothing of the host where unit is singular
    inverse_norm = torch.linalg.matrix_norm(inverse.mT @ inverse).max()
    good = (info == 0).all() & (unit.diagonal(dim1=-2, dim2=-1) > 0).all() & inverse_norm.isfinite()
    amplification = torch.where(good, inverse_norm, math.inf).item()  # the one host synchronisation
    return unit / scale.unsqueeze(-1), amplification


def _gram(factors: LowRankFactors, dtype: torch.dtype, masses: bool, projection: Projection | None) -> Tensor:
    """Return the weighted Gram matrix, and fill in the projection where one pass can do both."""
    if projection is None or not factors.compiled(projection.vector, projection.mean):
        return gram(factors, dtype, point_masses=masses)
    given = (projection.vector, projection.mean)
    products, projection.sums = compiled.gram(factors.root, factors.diag, dtype, *given)
    return products


def _scan(factors: LowRankFactors) -> tuple[Tensor, bool]:
    """Return the sum of log d, and whether every d is known to be positive and finite."""
    if factors.compiled():
        log_diag, zeros, bad = compiled.scan(factors.diag)
        return log_diag, zeros == bad == 0
    return sum_log(factors), False


def _point_masses(factors: LowRankFactors) -> Tensor | None:
    """Return the mask of point masses or None, after checking that the diagonal makes a density possible."""
    diag = factors.diag
    if diag.numel() == 0:
        return None
    smallest, largest = torch.aminmax(diag)
    finite, positive, negative = torch.stack(
        (smallest.isfinite() & largest.isfinite(), smallest > 0, smallest < 0)
    ).tolist()  # one host synchronisation
    if not finite:
        count = int((~diag.isfinite()).sum())
        raise NonFiniteError(f"the diagonal must be finite everywhere; got {count} NaN or infinite entries.")
    if positive:
        return None
    if negative:
        raise NotPSDError(
            f"the diagonal must be >= 0 everywhere; got {int((diag < 0).sum())} negative entries of {diag.numel()}, "
            f"the smallest {smallest.item():.3e}."
        )
    point_mass = diag == 0
    total = torch.zeros((), dtype=torch.int64, device=diag.device)
    for part in factors.chunks():
        moved = (factors.mixed_rows(part, diag.dtype) != 0).any(-2)
        total += (point_mass[..., part] & moved).sum()
    bad = int(total)  # one host synchronisation, after the last chunk
    if bad:
        raise ZeroVarianceError(
            f"this needs a positive variance wherever the root is not zero; got {bad} coordinates of {diag.numel()} "
            "with zero diagonal under a non-zero root. Raise them with add_jitter()."
        )
    return point_mass


def sum_log(factors: LowRankFactors) -> Tensor:
    """Return the sum of log d over the free coordinates in float64, shape ``(*B,)``.

    Four float32 numbers multiply without overflow in float64, which leaves a quarter of the logarithms to take.
    """
    total = factors.zeros()
    for part in factors.chunks(1, factors.root.dtype):
        chunk = to_float64(factors.diag[..., part])
        chunk = chunk.masked_fill(chunk == 0, 1.0)
        if factors.diag.dtype is torch.float32 and chunk.shape[-1] % 4 == 0:
            chunk = chunk.unflatten(-1, (4, -1)).prod(-2)
        total += chunk.log().sum(-1)
    return total
