"""Principal directions of a low-rank-plus-diagonal matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, NotConvergedError, ShapeError
from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.devices import in_dtype
from lowrank_bdl.linalg.factors import LowRankFactors, gram
from lowrank_bdl.linalg.lanczos import lanczos
from lowrank_bdl.linalg.operator_state import LowRankPlusDiagState
from lowrank_bdl.linalg.precision import exact

VARIANCE_TOLERANCE = 1e-6
"""Largest estimated relative error of a variance that products in the storage dtype may cause."""
ORTHONORMAL_TOLERANCE = 1e-6
"""Largest estimated departure from orthonormality that products in the storage dtype may cause."""


@exact
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
    return low_rank_components(factors, k)


@exact
def low_rank_components(
    factors: LowRankFactors, k: "int | Callable[[Tensor], int]", *, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Return variances and directions of :math:`U = R M` by the K x K route, whatever the diagonal holds.

    Args:
        factors: The matrix, without batch axes; of the diagonal only dtype, device and length are used.
        k: How many; or a function of all variances ``(R,)``, float64 from large to small, that says how many.
        scaled: Return :math:`U V`, directions times standard deviations, in place of unit vectors.

    Returns:
        Variances ``(k,)`` and directions ``(D, k)`` as :func:`principal_components` does.

    Raises:
        ShapeError: If k is more than the numerical rank.
        NonFiniteError: If U holds a NaN or an infinity, or numbers whose squares overflow.

    Cost: two reads of the root, one write of the result, O(D K^2) time.
    """
    for dtype in dict.fromkeys((factors.diag.dtype, torch.float64)):
        matrix = factors.mixed_gram(gram(factors, dtype, weigh=False))
        if not bool(matrix.isfinite().all()):
            raise NonFiniteError("the low-rank part must be finite, and so must its squares; got a NaN or an infinity.")
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(-1), vectors.flip(-1)
        count = k if isinstance(k, int) else k(values)
        rounding = 2 * torch.finfo(dtype).eps
        if factors.compiled():
            rounding = compiled.rounding(factors.dim, dtype)
        if count == 0 or bool(rounding * values[0] <= VARIANCE_TOLERANCE * values[count - 1]):
            break  # else the Gram matrix in the storage dtype loses the smallest variance: again in float64
    smallest = factors.rank * torch.finfo(torch.float64).eps * values[:1].clamp_min(0)
    if count and not bool(values[count - 1] > smallest):
        numerical = int((values > smallest).sum())
        raise ShapeError(f"the low-rank part has numerical rank {numerical}; expected k at most that, got {count}.")
    values, vectors = values[:count], vectors[:, :count]
    inner = factors.mix_forward(vectors if scaled else vectors * values.rsqrt())
    dtype = factors.diag.dtype
    spread = 1.0 if scaled or not count else (values[0] / values[-1]).sqrt().item()
    if torch.finfo(dtype).eps * spread > ORTHONORMAL_TOLERANCE:
        dtype = torch.float64
    return values, rotate(factors, inner, dtype)


@exact
def rotate(factors: LowRankFactors, inner: Tensor, dtype: torch.dtype) -> Tensor:
    """Return R A in the dtype of the diagonal, ``(D, m)`` over contiguous ``(m, D)`` storage.

    Args:
        factors: R, without batch axes; its mix is not used.
        inner: A, shape ``(K, m)``, float64.
        dtype: Of the arithmetic.

    Cost: one read of the root, one write of the result.
    """
    if inner.shape[-1] and factors.compiled():
        return compiled.rotate(factors.root, inner.mT, dtype).mT
    directions = torch.empty(inner.shape[-1], factors.dim, dtype=factors.diag.dtype, device=factors.diag.device)
    for part in factors.chunks():
        directions[:, part] = in_dtype(inner.mT, dtype, factors.diag.device) @ factors.rows(part, dtype)
    return directions.mT
