"""Principal directions of a low-rank-plus-diagonal matrix."""

import torch
from torch import Tensor

from lowrank_bdl.errors import NotConvergedError, ShapeError
from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.factors import gram
from lowrank_bdl.linalg.lanczos import lanczos
from lowrank_bdl.linalg.operator_state import LowRankPlusDiagState

VARIANCE_TOLERANCE = 1e-6
"""Largest estimated relative error of a variance that products in the storage dtype may cause."""
ORTHONORMAL_TOLERANCE = 1e-6
"""Largest estimated departure from orthonormality that products in the storage dtype may cause."""


def principal_components(
    operator: LowRankPlusDiagState,
    k: int,
    of: str = "low_rank",
    *,
    tol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the k largest variances and their directions.

    Of the low-rank part, :math:`U = R M` with :math:`U^\top U = V \Lambda V^\top`, the variances are :math:`\Lambda`
    and the directions :math:`U V \Lambda^{-1/2}`: the K x K route to the SVD of U, uncentred, with Sigma's scale.
    Of the whole matrix they are found by Lanczos on its products.

    Args:
        operator: The matrix, without batch axes.
        k: How many, at most the numerical rank of the low-rank part, or D for the whole matrix.
        of: ``"low_rank"`` or ``"full"``.
        tol: Residual tolerance of Lanczos for ``"full"``, relative to the largest variance.
        generator: Source of the start vector of Lanczos for ``"full"``.

    Returns:
        Variances ``(k,)`` from large to small, float64 [parameter²], and orthonormal directions ``(D, k)`` in the dtype
        of the operator, over contiguous ``(k, D)`` storage.

    Raises:
        ShapeError: If k is out of range or the operator has batch axes.
        NotConvergedError: If Lanczos did not reach its tolerance.
        ValueError: If ``of`` is unknown.

    Cost: two reads of the root and O(D K^2) time; for ``"full"`` two reads for every product of Lanczos.
    """
    if operator.batch_shape:
        raise ShapeError(f"principal components need one matrix; got batch shape {tuple(operator.batch_shape)}.")
    if of == "full":
        pairs = lanczos(operator, k, tol=tol, generator=generator)
        if not bool(pairs.converged.all()):
            raise NotConvergedError(
                f"{int(pairs.converged.sum())} of {k} eigenpairs converged in {pairs.num_matvecs} products (largest "
                f"residual {pairs.residuals.max().item():.1e}); ask for fewer, or a larger tol."
            )
        return pairs.eigenvalues, pairs.eigenvectors
    if of != "low_rank":
        raise ValueError(f'of must be "low_rank" or "full", got {of!r}.')
    factors = operator.factors
    if not 0 <= k <= min(factors.rank, factors.dim):
        raise ShapeError(f"k must be between 0 and {min(factors.rank, factors.dim)}, the rank; got {k}.")
    for dtype in dict.fromkeys((operator.dtype, torch.float64)):
        values, vectors = torch.linalg.eigh(factors.mixed_gram(gram(factors, dtype, weigh=False)))
        values, vectors = values.flip(-1)[:k], vectors.flip(-1)[:, :k]
        rounding = 2 * torch.finfo(dtype).eps
        if factors.compiled():
            rounding = compiled.rounding(factors.dim, dtype)
        if k == 0 or bool(rounding * values[0] <= VARIANCE_TOLERANCE * values[-1]):
            break  # else the Gram matrix in the storage dtype loses the smallest variance: again in float64
    if k and not bool(values[-1] > factors.rank * torch.finfo(torch.float64).eps * values[0]):
        numerical = int((values > factors.rank * torch.finfo(torch.float64).eps * values[0].clamp_min(0)).sum())
        raise ShapeError(f"the low-rank part has numerical rank {numerical}; expected k at most that, got {k}.")
    inner = factors.mix_forward(vectors * values.rsqrt())
    dtype = operator.dtype
    if k and torch.finfo(dtype).eps * (values[0] / values[-1]).sqrt().item() > ORTHONORMAL_TOLERANCE:
        dtype = torch.float64
    if k and factors.compiled():
        return values, compiled.rotate(factors.root, inner.mT, dtype).mT
    directions = torch.empty(k, factors.dim, dtype=operator.dtype, device=operator.device)
    for part in factors.chunks():
        directions[:, part] = inner.mT.to(dtype) @ factors.rows(part, dtype)
    return values, directions.mT
