"""Log-determinants: exact where the class of the matrix knows its own, by stochastic Lanczos quadrature elsewhere."""

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.probing import Matrix, ProbedMatrix, Progress, StochasticEstimate, exact_estimate
from lowrank_bdl.linalg.spectral_density import spectral_density
from lowrank_bdl.linalg.stochastic_trace import choose_method, is_structured


@exact
def logdet(
    matrix: Matrix,
    num_probes: int = 20,
    num_steps: int = 50,
    *,
    method: str = "auto",
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    reorthogonalize: bool = False,
    progress: Progress | None = None,
) -> StochasticEstimate:
    r"""Estimate :math:`\log |A| = \mathrm{tr} \log A` of a symmetric positive definite matrix [nat].

    The error bar is that of the probes. The quadrature has an error of its own, upwards on average, which falls as
    :math:`\exp(-4 m / \sqrt\kappa)` with m steps at the condition number :math:`\kappa`: ``truncation`` says how much
    the second half of the steps still changed. Raise ``num_steps`` while it is larger than the standard error.

    Args:
        matrix: A LinearOperator or dense tensor ``(D, D)``, or a function from ``(D,)`` to ``(D,)``.
        num_probes: P >= 1.
        num_steps: m >= 1; more than D means D.
        method: ``"slq"``, ``"exact"`` for classes that know their log-determinant (those of this library, with
            coordinates that are point masses left out, and linear_operator's diagonal ones), or ``"auto"``: exact where
            possible.
        size: D, for a function.
        dtype: Of the vectors that a function takes; torch's default if None.
        device: Where these live; torch's default if None.
        generator: Source of the random signs.
        reorthogonalize: See `spectral_density`.
        progress: Called after every block of products with the number of products so far, out of P m.

    Raises:
        NotPSDError: If an eigenvalue is negative, zero, or lost in the rounding of the dtype beside the largest one.
        ShapeError: If the matrix is not ``(D, D)``, or a product has another shape than its vector.
        ValueError: If a count is no positive integer, ``method`` is unknown or not possible, a function comes without
            size, or the matrix is seen not to be symmetric.
        TypeError: If the matrix is none of these, or its numbers are not real floating-point ones.
        NonFiniteError: If a product holds NaN or infinity.
        MemoryLimitError: If the vectors do not fit the free memory, before any of them is made.

    Cost: P m products and four vectors a probe.

    Example:
        >>> root = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> product = lambda v: v + root @ (root.T @ v)
        >>> found = logdet(product, 4, 12, size=200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        >>> exact = torch.logdet(torch.eye(5).double() + root.T @ root)
        >>> bool((found.value - exact).abs() < 4 * found.standard_error)
        True
    """
    probed = ProbedMatrix(matrix, size, dtype, device)
    if choose_method(method, ("slq",), is_structured(matrix), matrix) == "exact":
        assert isinstance(matrix, LinearOperator)
        return exact_estimate(_exact(matrix))
    density = spectral_density(
        matrix,
        num_probes,
        num_steps,
        size=size,
        dtype=dtype,
        device=device,
        generator=generator,
        reorthogonalize=reorthogonalize,
        progress=progress,
    )
    used = density.nodes[density.weights > 0]
    if bool(used.min() <= torch.finfo(probed.dtype).eps * used.abs().max()):
        raise NotPSDError(
            "the matrix must be positive definite to the precision of its dtype; "
            f"its eigenvalues reach from {used.min().item():.6g} to {used.max().item():.6g}."
        )
    return density.integrate(torch.log)


def _exact(operator: LinearOperator) -> Tensor:
    """Return the log-determinant of a structured operator in float64."""
    if not isinstance(operator, DiagLinearOperator):
        value: Tensor = operator.logdet().detach().double()
        return value
    entries: Tensor = operator.diagonal().detach().double()
    if not bool((entries > 0).all()):
        raise NotPSDError(f"the diagonal must be > 0 everywhere; got minimum {entries.min().item():.6g}.")
    return entries.log().sum()
