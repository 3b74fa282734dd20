r"""Extreme eigenpairs of a symmetric operator by thick-restart Lanczos.

K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal. Appl. 22
(2000). Every new vector is orthogonalised twice against the whole basis by matrix products (one pass is not enough on
Hessian-like spectra), eigenvalues of either sign come out as they are, and a breakdown (an invariant subspace)
continues with a fresh random direction, so that multiplicities are found.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.factors import CPU_CHUNK
from lowrank_bdl.linalg.memory import require_memory

WHICH = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs with proof of quality.

    Attributes:
        eigenvalues: Shape ``(k,)``, float64, from large to small.
        eigenvectors: Shape ``(D, k)``, orthonormal columns over ``(k, D)`` storage, dtype of the operator.
        residuals: ``||A v - lambda v||``, shape ``(k,)``, float64, measured with one product each.
        converged: Whether each residual is within the tolerance, shape ``(k,)`` bool.
        num_matvecs: Products with the operator, those of the residuals included.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_matvecs: int


def lanczos(
    operator: LinearOperator | Callable[[Tensor], Tensor],
    k: int | tuple[int, int],
    which: str = "LA",
    *,
    tol: float | None = None,
    max_matvecs: int | None = None,
    num_basis: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""Return k extreme eigenpairs of a symmetric D x D operator.

    Args:
        operator: A LinearOperator of shape ``(D, D)``, or a function from ``(D,)`` to ``(D,)`` (then give ``start``).
        k: How many pairs, or ``(n_top, n_bottom)`` from both ends of the spectrum.
        which: Largest (``"LA"``), smallest (``"SA"``), largest in size (``"LM"``), or both ends in equal parts, the top
            having one more if k is odd (``"BE"``). Not used with a pair.
        tol: Residual tolerance relative to the largest Ritz value in size; None means ``eps ** (2/3)`` of the dtype.
        max_matvecs: The most products to spend on the iteration, >= k; None means ``max(300, 20 k)``.
        num_basis: Basis vectors kept, > k (D if k = D); None means ``max(2 k + 10, k + 20)``. Memory:
            ``(num_basis + 1) D`` numbers.
        start: Start vector, shape ``(D,)``, not zero; None draws one.
        generator: Source of the start vector and of fresh directions.

    Raises:
        ShapeError: If the operator is not square or k does not fit.
        ValueError: If ``which`` is unknown, ``start`` is zero, or ``num_basis`` or ``max_matvecs`` is too small for k.
        MemoryLimitError: If the basis does not fit the free memory, before it is allocated.
        NonFiniteError: If ``start`` or a product holds NaN or infinity.

    Cost: ``num_matvecs`` products and O(D num_basis) work for each; one host synchronisation a step.

    Example:
        >>> import torch
        >>> from linear_operator.operators import DiagLinearOperator
        >>> operator = DiagLinearOperator(torch.arange(50.0).double())
        >>> pairs = lanczos(operator, 2, generator=torch.Generator().manual_seed(0))
        >>> pairs.eigenvalues.round(decimals=6)
        tensor([49., 48.], dtype=torch.float64)
    """
    if start is None and not isinstance(operator, LinearOperator):
        raise ValueError("a function as operator needs a start vector, for its size, dtype and device.")
    if isinstance(operator, LinearOperator) and (operator.ndim != 2 or not operator.is_square):
        raise ShapeError(f"the operator must be (D, D); got {tuple(operator.shape)}.")
    if start is None:
        assert isinstance(operator, LinearOperator)
        size, dtype, device = operator.shape[-1], operator.dtype, operator.device
        start = torch.randn(size, dtype=dtype, device=device, generator=generator)
    if start.ndim != 1 or (isinstance(operator, LinearOperator) and len(start) != operator.shape[-1]):
        raise ShapeError(f"start must be a vector of the size of the operator; got {tuple(start.shape)}.")
    size = start.shape[0]
    top, bottom, by_size = _split(k, which, size)
    wanted = top + bottom
    if wanted == 0:
        empty = torch.zeros(0, dtype=torch.float64, device=start.device)
        return Eigenpairs(empty, start.new_zeros(0, size).mT, empty, empty.bool(), 0)
    capacity = min(size, max(2 * wanted + 10, wanted + 20) if num_basis is None else num_basis)
    limit = max(300, 20 * wanted) if max_matvecs is None else max_matvecs
    if capacity < min(wanted + 1, size) or limit < wanted:
        raise ValueError(
            f"{wanted} pairs need num_basis >= {min(wanted + 1, size)} and max_matvecs >= {wanted}; "
            f"got {num_basis} and {max_matvecs}."
        )
    if not bool(start.isfinite().all()):
        raise NonFiniteError("the start vector must be finite; it holds NaN or infinity.")
    if not bool((start != 0).any()):
        raise ValueError("the start vector must not be zero.")
    state = _Basis(operator, start, capacity, generator)
    tolerance = torch.finfo(start.dtype).eps ** (2 / 3) if tol is None else tol
    while True:
        state.fill(limit)
        values, vectors, residuals = state.ritz()
        order = _choose(values, top, bottom, by_size)
        done = bool((residuals[order] <= tolerance * values.abs().max()).all())
        if done or state.size == size or state.num_matvecs >= limit:
            break
        spare = (state.capacity - wanted) // 2  # more Ritz vectors than wanted, near them, speed up the next cycle
        extra = _choose(values, top + (spare if top else 0), bottom + (spare if bottom else 0), by_size)
        state.restart(extra[: state.capacity - 1], values, vectors)
    order = order[values[order].argsort(descending=True)]
    state.rotate(vectors[:, order])
    return state.finish(values[order], tolerance * values.abs().max())


def _split(k: int | tuple[int, int], which: str, size: int) -> tuple[int, int, bool]:
    """Return how many pairs to find at the top and at the bottom, and whether to choose by absolute value."""
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}; got {which!r}.")
    counts = k if isinstance(k, tuple) else (k, 0)
    if min(counts) < 0 or sum(counts) > size:
        raise ShapeError(f"k must be between 0 and D = {size} in all; got {k}.")
    if isinstance(k, tuple) or which == "LA":
        return counts[0], counts[1], False
    if which == "SA":
        return 0, k, False
    return (k, 0, True) if which == "LM" else (k - k // 2, k // 2, False)


def _choose(values: Tensor, top: int, bottom: int, by_size: bool) -> Tensor:
    """Return indices of the chosen Ritz values among ``values`` (ascending), each once."""
    count = len(values)
    if by_size:
        return values.abs().argsort(descending=True)[:top]
    bottom = min(bottom, count)
    top = min(top, count - bottom)
    return torch.cat((torch.arange(count - top, count), torch.arange(bottom))).to(values.device)


class _Basis:
    """Orthonormal rows Q (capacity + 1, D) and the projected matrix T = Q A Q' of the rows filled so far."""

    def __init__(
        self,
        operator: LinearOperator | Callable[[Tensor], Tensor],
        start: Tensor,
        capacity: int,
        generator: torch.Generator | None,
    ) -> None:
        self.product = operator.matmul if isinstance(operator, LinearOperator) else operator
        self.capacity, self.generator = capacity, generator
        num_bytes = (capacity + 1) * start.numel() * start.element_size()
        require_memory(num_bytes, start.device, f"the Lanczos basis of {capacity + 1} vectors of {start.numel():,}")
        self.rows = start.new_empty(capacity + 1, len(start))
        self.rows[0] = start / _norm(start)
        self.projected = torch.zeros(capacity, capacity, dtype=torch.float64, device=start.device)
        self.size = 0  # rows with a complete column of T
        self.last_norm = torch.zeros((), dtype=torch.float64, device=start.device)
        self.num_matvecs = 0

    def fill(self, limit: int) -> None:
        """Extend the basis to its capacity, or until ``limit`` products are spent."""
        while self.size < self.capacity and (self.num_matvecs < limit or self.size == 0):
            j = self.size
            new = self.product(self.rows[j]).detach().clone()
            self.num_matvecs += 1
            norm = _norm(new)
            weights = self._orthogonalize(new, j + 1)
            self.projected[j, : j + 1] = weights
            self.projected[: j + 1, j] = weights
            self.last_norm = _norm(new)
            before, after = torch.stack((norm, self.last_norm)).tolist()
            if not before < float("inf"):
                raise NonFiniteError(f"product {self.num_matvecs} with the operator holds NaN or infinity.")
            self.size = j + 1
            if self.size == len(new):
                self.last_norm = torch.zeros_like(self.last_norm)
                return
            if after <= 10 * torch.finfo(new.dtype).eps * max(before, self.projected.abs().max().item()):
                self.last_norm = torch.zeros_like(self.last_norm)  # invariant subspace: go on in a fresh direction
                new.normal_(generator=self.generator)
                self._orthogonalize(new, j + 1)
                self._orthogonalize(new, j + 1)
            self.rows[j + 1] = new / _norm(new)

    def _orthogonalize(self, new: Tensor, count: int) -> Tensor:
        """Remove the span of the first ``count`` rows from ``new`` in place, in two passes; return the coefficients."""
        total = torch.zeros(count, dtype=torch.float64, device=new.device)
        for _ in range(2):
            weights = self.rows[:count] @ new
            new.addmv_(self.rows[:count].mT, weights, alpha=-1)
            total += weights.double()
        return total

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values (ascending), their coordinates in the basis, and residual norms by the last row."""
        values, vectors = torch.linalg.eigh(self.projected[: self.size, : self.size])
        return values, vectors, (self.last_norm * vectors[-1]).abs()

    def rotate(self, vectors: Tensor) -> None:
        """Replace the first rows by ``vectors.mT @ rows`` in chunks of columns: no second basis is made."""
        keep = vectors.mT.to(self.rows.dtype)
        for start in range(0, self.rows.shape[1], CPU_CHUNK):
            chunk = self.rows[:, start : start + CPU_CHUNK]
            chunk[: len(keep)] = keep @ chunk[: self.size]

    def restart(self, order: Tensor, values: Tensor, vectors: Tensor) -> None:
        """Keep the Ritz vectors ``order`` and the last row; T becomes diagonal but for its last row."""
        keep = len(order)
        last = self.rows[self.size].clone()
        self.rotate(vectors[:, order])
        self.rows[keep] = last
        self.projected.zero_()
        self.projected.diagonal()[:keep] = values[order]
        self.size = keep

    def finish(self, values: Tensor, tolerance: Tensor) -> Eigenpairs:
        """Measure the residual of every pair in the first rows."""
        count = len(values)
        rows = self.rows[:count].clone()
        residuals = torch.zeros_like(values)
        for i in range(count):
            product = self.product(rows[i]).detach()
            residuals[i] = _norm(product - values[i].to(rows.dtype) * rows[i])
        self.num_matvecs += count
        return Eigenpairs(values, rows.mT, residuals, residuals <= tolerance, self.num_matvecs)


def _norm(vector: Tensor) -> Tensor:
    """Return the 2-norm in float64: the squares of a float32 vector of 1e-20 would underflow."""
    norm: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return norm
