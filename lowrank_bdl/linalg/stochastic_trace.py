r"""Trace and diagonal of a matrix of which only products are known.

M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix, Communications in Statistics B 19 (1990);
R. A. Meyer, C. Musco, C. Musco and D. P. Woodruff, Hutch++: optimal stochastic trace estimation, SOSA (2021), algorithm
1; C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Applied Numerical Mathematics 57
(2007).
"""

import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, LinearOperator
from torch import Tensor

from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.moments import StreamingMoments
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.probing import (
    Matrix,
    ProbedMatrix,
    Progress,
    StochasticEstimate,
    estimate_mean,
    exact_estimate,
    require_count,
    row_dots,
)

STRUCTURED = (
    LowRankPlusDiagLinearOperator,
    InverseLowRankPlusDiagLinearOperator,
    KroneckerSpectralLinearOperator,
    DiagLinearOperator,
)


def is_structured(matrix: Matrix) -> bool:
    """Return whether the class of ``matrix`` knows its own diagonal and log-determinant, without approximation."""
    if isinstance(matrix, BlockDiagonalLinearOperator):
        return all(is_structured(block) for block in matrix.blocks)
    return isinstance(matrix, STRUCTURED)


def choose_method(method: str, sampled: tuple[str, ...], exact: bool, matrix: Matrix) -> str:
    """Return which of ``sampled`` to use, or ``"exact"``.

    Args:
        method: One of ``sampled``, ``"exact"``, or ``"auto"``: exact where possible, else the first of ``sampled``.
        sampled: What there is beside these two.
        exact: Whether the exact result can be had.
        matrix: For the message.

    Raises:
        ValueError: If ``method`` is none of these, or there is no exact result.
    """
    names = ("auto", "exact", *sampled)
    if method not in names:
        raise ValueError(f"method must be one of {', '.join(names)}; got {method!r}.")
    if method == "exact" and not exact:
        raise ValueError(f"method='exact' needs a matrix whose class knows the answer; got {type(matrix).__name__}.")
    if method == "auto":
        return "exact" if exact else sampled[0]
    return method


def _exact_diagonal(matrix: Matrix) -> Tensor | None:
    """Return the diagonal in float64 where it can be read off, else None."""
    if isinstance(matrix, Tensor):
        return matrix.detach().diagonal().double()
    if isinstance(matrix, LinearOperator) and (is_structured(matrix) or isinstance(matrix, DenseLinearOperator)):
        diagonal: Tensor = matrix.diagonal().detach().double()
        return diagonal
    return None


@exact
def trace(
    matrix: Matrix,
    num_matvecs: int = 60,
    *,
    method: str = "auto",
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> StochasticEstimate:
    r"""Estimate :math:`\mathrm{tr} A` of a square matrix, without bias.

    ``"hutchinson"`` averages :math:`z^\top A z` over vectors z of random signs; its variance is
    :math:`\frac{2}{n} \sum_{i \ne j} a_{ij}^2` for n products with a symmetric matrix. ``"hutch++"`` spends a third of
    the products on an orthonormal basis Q of the range of A times random signs, a third on the exact
    :math:`\mathrm{tr}(Q^\top A Q)`, and the rest on Hutchinson's estimate of what is left, :math:`(I - Q Q^\top) A (I -
    Q Q^\top)`: exact if the rank of A is at most a third of the products, better if a few eigenvalues dominate, and
    with :math:`\sqrt 3` times Hutchinson's error if none do.

    Args:
        matrix: A LinearOperator or dense tensor ``(D, D)``, or a function from ``(D,)`` to ``(D,)``.
        num_matvecs: Products with one vector: >= 1, or >= 3 for ``"hutch++"``.
        method: ``"hutch++"``, ``"hutchinson"``, ``"exact"`` for dense matrices and for classes that know their
            diagonal (those of this library, and linear_operator's diagonal ones), or ``"auto"``: exact where possible,
            else ``"hutch++"``.
        size: D, for a function.
        dtype: Of the vectors that a function takes; torch's default if None.
        device: Where these live; torch's default if None.
        generator: Source of the signs.
        progress: Called after every block of products with the number of products so far.

    Raises:
        ShapeError: If the matrix is not ``(D, D)``, or a product has another shape than its vector.
        ValueError: If ``num_matvecs`` is too small, ``method`` is unknown or not possible, or a function comes without
            size.
        TypeError: If the matrix is none of these, or its numbers are not real floating-point ones.
        NonFiniteError: If a product holds NaN or infinity.
        MemoryLimitError: If the vectors do not fit the free memory, before any of them is made.

    Cost: the products, and two vectors a probe; ``"hutch++"`` holds a third of ``num_matvecs`` vectors three times, and
    takes O(D n²) for its basis.

    Example:
        >>> root = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> found = trace(lambda v: root @ (root.T @ v), 9, size=100, dtype=torch.float64)
        >>> torch.allclose(found.value, root.square().sum())  # rank 3
        True
    """
    probed = ProbedMatrix(matrix, size, dtype, device, progress)
    diagonal = _exact_diagonal(matrix)
    method = choose_method(method, ("hutch++", "hutchinson"), diagonal is not None, matrix)
    require_count("num_matvecs", num_matvecs, 3 if method == "hutch++" else 1)
    if method == "exact" and diagonal is not None:
        probed.require_finite(diagonal)
        return exact_estimate(diagonal.sum())
    if method == "hutchinson":
        return estimate_mean(_quadratic_forms(probed, num_matvecs, None, generator), probed.num_matvecs)
    rank = min(num_matvecs // 3, probed.size)
    probed.require_vectors(3 * rank, f"the basis of Hutch++, {rank} vectors of {probed.size:,},")
    basis = probed.product(probed.probes(rank, generator))
    probed.require_finite(basis)
    basis = torch.linalg.qr(basis.mT).Q.mT.contiguous()
    known = row_dots(basis, probed.product(basis)).sum()
    rest = estimate_mean(_quadratic_forms(probed, num_matvecs - 2 * rank, basis, generator), 0)
    probed.require_finite(known)
    return StochasticEstimate(known + rest.value, rest.standard_error, rest.truncation, probed.num_matvecs)


def _quadratic_forms(
    probed: ProbedMatrix, count: int, basis: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Return z'Az of random signs z, shape ``(count,)``, float64; without their part in the rows of ``basis``."""
    forms = []
    for together in probed.blocks(count, 3, f"a block of probes of {probed.size:,}"):
        rows = probed.probes(together, generator)
        for _ in range(0 if basis is None else 2):
            assert basis is not None
            rows.addmm_(rows @ basis.mT, basis, alpha=-1)
        forms.append(row_dots(rows, probed.product(rows)))
    probed.require_finite(*forms)
    return torch.cat(forms)


@exact
def diagonal(
    matrix: Matrix,
    num_probes: int = 100,
    *,
    method: str = "auto",
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> StochasticEstimate:
    r"""Estimate the diagonal of a square matrix, without bias, as the mean of :math:`z \odot A z`.

    z are vectors of random signs: the variance of entry i is :math:`\frac{1}{n} \sum_{j \ne i} a_{ij}^2` with n of
    them, and a diagonal matrix is exact after one.

    Args:
        matrix: A LinearOperator or dense tensor ``(D, D)``, or a function from ``(D,)`` to ``(D,)``.
        num_probes: n >= 1 products with one vector.
        method: ``"hutchinson"``, ``"exact"`` for dense matrices and for classes that know their diagonal (those of this
            library, and linear_operator's diagonal ones), or ``"auto"``: exact where possible.
        size: D, for a function.
        dtype: Of the vectors that a function takes; torch's default if None.
        device: Where these live; torch's default if None.
        generator: Source of the signs.
        progress: Called after every block of products with the number of products so far.

    Returns:
        Value and standard error of every entry, shape ``(D,)``, float64.

    Raises:
        ShapeError: If the matrix is not ``(D, D)``, or a product has another shape than its vector.
        ValueError: If ``num_probes`` is no positive integer, ``method`` is unknown or not possible, or a function comes
            without size.
        TypeError: If the matrix is none of these, or its numbers are not real floating-point ones.
        NonFiniteError: If a product holds NaN or infinity.
        MemoryLimitError: If the vectors do not fit the free memory, before any of them is made.

    Cost: the products; two vectors a probe, and three in float64.

    Example:
        >>> found = diagonal(lambda v: torch.arange(4.0) * v, 1, size=4)
        >>> found.value
        tensor([0., 1., 2., 3.], dtype=torch.float64)
    """
    probed = ProbedMatrix(matrix, size, dtype, device, progress)
    known = _exact_diagonal(matrix)
    method = choose_method(method, ("hutchinson",), known is not None, matrix)
    require_count("num_probes", num_probes)
    if method == "exact" and known is not None:
        probed.require_finite(known)
        return exact_estimate(known)
    moments = StreamingMoments(probed.size, dtype=torch.float64, device=probed.device)
    for together in probed.blocks(num_probes, 3, f"a block of probes of {probed.size:,}"):
        rows = probed.probes(together, generator)
        products = rows.mul_(probed.product(rows))
        probed.require_finite(products)
        for row in products:
            moments.update(row)
    value = moments.mean
    error = (moments.variance() / num_probes).sqrt() if num_probes > 1 else torch.full_like(value, torch.nan)
    return StochasticEstimate(value, error, value.new_zeros(()), probed.num_matvecs)
