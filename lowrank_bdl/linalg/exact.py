"""What an operator of this library does where its structure offers no way of its own: exactly, or not at all.

Above 800 coordinates linear_operator answers solves, log-determinants, roots, draws and eigenvectors by conjugate
gradients, Lanczos iterations and pivoted factors, without a word and as global settings say. Here every such operation
is computed from the dense matrix in float64 up to that size, and refused above it.

Operators are pickled as their class and the tensors that its constructor takes, and the classes are registered with
``torch.serialization.add_safe_globals``: ``torch.load`` reads them with ``weights_only=True`` once the library is
imported, and the constructors check what comes in.
"""

from typing import Any, NoReturn

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    TriangularLinearOperator,
    to_linear_operator,
)
from linear_operator.utils.memoize import add_to_cache
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import MemoryLimitError, NotPSDError, ShapeError
from lowrank_bdl.linalg.devices import sums_device, to_float64
from lowrank_bdl.linalg.indices import Index, plain_index, same_index
from lowrank_bdl.linalg.precision import exact_methods

DENSE_LIMIT_GIB = 4.0
"""The largest dense matrix that `to_dense` makes unless told otherwise [GiB]."""
DENSE_SIZE = 800
"""Coordinates up to which an operation without a structured form is computed from the dense matrix unasked."""

COLUMNS_AT_ONCE = 256
"""Columns of the matrix that are multiplied out at once where single entries are asked for."""


def check_dense_size(operator: LinearOperator, limit_gib: float) -> None:
    """Raise MemoryLimitError if the dense matrix of ``operator`` would be larger than ``limit_gib`` [GiB]."""
    need = operator.shape.numel() * operator.dtype.itemsize / 2**30
    if need > limit_gib:
        raise MemoryLimitError(
            f"the dense {tuple(operator.shape)} matrix needs {need:.1f} GiB, more than the limit of {limit_gib:g} GiB; "
            "its products, solves, draws and eigenvectors need no dense matrix."
        )


@exact_methods
class ExactLinearOperator(LinearOperator):
    """The operations of `LinearOperator` without its iterations; subclasses give those that their structure has.

    All methods of all subclasses run in `own_precision`, whatever autocast and TF32 are set to.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        exact_methods(cls)

    # ---- the dense matrix -------------------------------------------------------------------------------------------

    def _require_square(self, operation: str) -> None:
        if not self.is_square:
            raise ShapeError(f"{operation} needs a square matrix; got shape {tuple(self.shape)}.")

    def _dense(self, operation: str, symmetric: bool = False) -> Tensor:
        """Return the small dense matrix in float64.

        Args:
            operation: What it is for; said in errors.
            symmetric: Whether to check that it is symmetric, and to remove what rounding leaves.

        Raises:
            ShapeError: If the matrix is not square.
            NotImplementedError: If it has more than `DENSE_SIZE` coordinates.
        """
        self._require_square(operation)
        if self.shape[-1] > DENSE_SIZE:
            raise NotImplementedError(
                f"{operation} of a {type(self).__name__} has no exact form of this structure, and is computed densely "
                f"only up to {DENSE_SIZE} coordinates; got {self.shape[-1]}. Decompose its to_dense() yourself, or use "
                "lanczos() for leading eigenvalues and lowrank_bdl.logdet() for estimates with an error bar."
            )
        dense = to_float64(self.to_dense())
        return self._symmetrized(dense, operation) if symmetric else dense

    def _symmetrized(self, dense: Tensor, operation: str) -> Tensor:
        apart = (dense.detach() - dense.detach().mT).abs()
        if apart.numel() and bool((apart > torch.finfo(self.dtype).eps ** 0.5 * dense.detach().abs().max()).any()):
            raise NotImplementedError(
                f"{operation} needs a symmetric matrix; entries of this {type(self).__name__} and of its transpose "
                f"differ by up to {apart.max().item():.1e}."
            )
        return (dense + dense.mT) / 2

    def _invertible(self, operation: str) -> Tensor:
        """Return the small dense matrix in float64, checked to have an inverse."""
        dense = self._dense(operation)
        if dense.numel():
            values = torch.linalg.svdvals(dense.detach())
            largest, smallest = values[..., 0], values[..., -1]
            if not bool((smallest > torch.finfo(self.dtype).eps * largest).all()):
                raise NotPSDError(
                    f"{operation} needs a matrix that has an inverse; the singular values of this one reach from "
                    f"{smallest.min().item():.3e} to {largest.max().item():.3e}. add_jitter() may help."
                )
        return dense

    # ---- solves and determinants ------------------------------------------------------------------------------------

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``A^-1 right``, or ``left A^-1 right``; shapes ``(*B, D, S)`` or ``(D,)``, and ``(*B, O, D)``.

        Raises:
            NotPSDError: If the matrix has no inverse to the precision of its dtype.
            NotImplementedError: If neither its structure has a solve nor is it small.
        """
        dense = self._invertible("solve()")
        columns = right_tensor.unsqueeze(-1) if right_tensor.ndim == 1 else right_tensor
        result: Tensor = torch.linalg.solve(dense, to_float64(columns)).to(self.device, self.dtype)
        result = result.squeeze(-1) if right_tensor.ndim == 1 else result
        return result if left_tensor is None else left_tensor @ result

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Tensor:
        if num_tridiag:
            raise NotImplementedError("no tridiagonal matrices here: this solve is direct, not by conjugate gradients.")
        return self.solve(rhs)

    def _cholesky_solve(self, rhs: Tensor, upper: bool | None = False) -> Tensor:
        return self.solve(rhs)

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\mathrm{tr}(X^\top A^{-1} X)` and :math:`\log|A|`, float64; zeros for what was not asked for.

        Args:
            inv_quad_rhs: :math:`X`, shape ``(*B, D, S)`` or ``(D,)``.
            logdet: Whether to compute the log-determinant.
            reduce_inv_quad: Whether to sum over the S columns.
        """
        value = log_determinant = torch.zeros((), dtype=torch.float64, device=sums_device(self.device))
        if inv_quad_rhs is not None:
            product = to_float64(self.solve(inv_quad_rhs)) * to_float64(inv_quad_rhs)
            value = product.sum(-1 if inv_quad_rhs.ndim == 1 else -2)
            value = value.sum(-1) if reduce_inv_quad and inv_quad_rhs.ndim > 1 else value
        return value, self._logdet() if logdet else log_determinant

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        r"""Return :math:`\mathrm{tr}(X^\top A^{-1} X)`, as `inv_quad_logdet` does."""
        return self.inv_quad_logdet(inv_quad_rhs, reduce_inv_quad=reduce_inv_quad)[0]

    def logdet(self) -> Tensor:
        r"""Return :math:`\log|A|`, shape ``(*B,)``, float64 [nat]."""
        return self._logdet()

    def _logdet(self) -> Tensor:
        value: Tensor
        sign, value = torch.linalg.slogdet(self._invertible("logdet()"))
        if not bool((sign > 0).all()):
            raise NotPSDError("logdet() needs a matrix with a positive determinant; that of this one is negative.")
        return value

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Any:
        r"""Return :math:`A^{-1/2} X` for ``rhs`` X; with ``lhs`` L, L times that and the diagonal of L A^-1 L'."""
        values, vectors = torch.linalg.eigh(self._dense("sqrt_inv_matmul()", symmetric=True))
        self._require_positive(values, "sqrt_inv_matmul()")
        columns = to_float64(rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs)
        result = vectors @ (values.rsqrt().unsqueeze(-1) * (vectors.mT @ columns))
        result = (result.squeeze(-1) if rhs.ndim == 1 else result).to(self.dtype)
        if lhs is None:
            return result
        return lhs @ result, self.inv_quad(lhs.mT, reduce_inv_quad=False).to(self.dtype)

    def _require_positive(self, values: Tensor, operation: str, singular: bool = False) -> None:
        """Raise NotPSDError unless eigenvalues are positive, or zero up to rounding where ``singular`` is allowed."""
        smallest, largest = (values.detach().amin(), values.detach().amax()) if values.numel() else (1.0, 1.0)
        rounding = torch.finfo(self.dtype).eps * max(self.shape[-1], 1) * abs(float(largest))
        if not float(smallest) >= (-rounding if singular else rounding):
            raise NotPSDError(
                f"{operation} needs a positive {'semi-' if singular else ''}definite matrix; its eigenvalues reach "
                f"from {float(smallest):.3e} to {float(largest):.3e}."
            )

    # ---- roots and draws --------------------------------------------------------------------------------------------

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """Return a square root ``R`` with ``R R' = A``; ``method`` is not needed."""
        values, vectors = torch.linalg.eigh(self._dense("root_decomposition()", symmetric=True))
        self._require_positive(values, "root_decomposition()", singular=True)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        return RootLinearOperator(to_linear_operator(root.to(self.dtype)))

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return a square root ``T`` with ``T T' = A^-1``; the arguments are not needed."""
        values, vectors = torch.linalg.eigh(self._dense("root_inv_decomposition()", symmetric=True))
        self._require_positive(values, "root_inv_decomposition()")
        return RootLinearOperator(to_linear_operator((vectors * values.rsqrt().unsqueeze(-2)).to(self.dtype)))

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Return exact draws from N(0, A), shape ``(num_samples, *B, D)``."""
        root = self.root_decomposition().root
        shape = (*self.batch_shape, root.shape[-1], num_samples)
        draws: Tensor = root.matmul(torch.randn(shape, dtype=self.dtype, device=self.device))
        return draws.movedim(-1, 0)

    # ---- factorisations that are asked for by name ------------------------------------------------------------------

    def _large_dense(self, operation: str) -> Tensor:
        """Return the symmetric matrix in float64, also a large one: its decomposition was asked for."""
        self._require_square(operation)
        check_dense_size(self, DENSE_LIMIT_GIB)
        return self._symmetrized(to_float64(self.to_dense()), operation)

    def _cholesky(self, upper: bool | None = False) -> LinearOperator:
        factor, info = torch.linalg.cholesky_ex(self._large_dense("cholesky()"))
        if bool((info != 0).any()):
            raise NotPSDError("cholesky() needs a positive definite matrix; a pivot of this one is not positive.")
        factor = factor.to(self.dtype)
        return TriangularLinearOperator(factor.mT if upper else factor, upper=bool(upper))

    def _symeig(
        self, eigenvectors: bool = False, return_evals_as_lazy: bool | None = False
    ) -> tuple[Tensor, LinearOperator | None]:
        """Return all eigenvalues, ascending and with their signs: linear_operator's own sets negative ones to zero."""
        dense = self._large_dense("an eigendecomposition")
        if not eigenvectors:
            return torch.linalg.eigvalsh(dense).to(self.dtype), None
        values, vectors = torch.linalg.eigh(dense)
        return values.to(self.dtype), DenseLinearOperator(vectors.to(self.dtype))

    def _svd(self) -> tuple[LinearOperator, Tensor, LinearOperator]:
        check_dense_size(self, DENSE_LIMIT_GIB)
        left, values, right = torch.linalg.svd(to_float64(self.to_dense()), full_matrices=False)
        left, values, right = (part.to(self.dtype) for part in (left, values, right))
        return DenseLinearOperator(left), values, DenseLinearOperator(right.mT)

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, Any]:
        """Return all eigenvalues and eigenvectors, where the dense matrix fits; `lanczos` gives some of a large one."""
        if method not in (None, "symeig"):
            raise NotImplementedError(f"diagonalization takes method 'symeig' or None; got {method!r}. Use lanczos().")
        values, vectors = self._symeig(eigenvectors=True)
        return values, vectors

    def pivoted_cholesky(self, rank: int, error_tol: float | None = None, return_pivots: bool = False) -> Any:
        """Return the pivoted Cholesky factor ``(*B, D, rank)`` of a matrix of at most 800 coordinates.

        Args:
            rank: Number of columns.
            error_tol: Stop when the trace of what is left is below it, the factor being narrower then; None goes on.
            return_pivots: Whether to return the pivots ``(*B, columns)`` too.
        """
        rest = self._dense("pivoted_cholesky()", symmetric=True)
        columns, pivots = [], []
        for _ in range(min(rank, self.shape[-1])):
            left = rest.diagonal(dim1=-2, dim2=-1)
            if error_tol is not None and not bool((left.sum(-1) > error_tol).any()):
                break
            largest, pivot = left.max(-1)
            self._require_positive(left, "pivoted_cholesky()", singular=True)
            chosen = pivot[..., None, None].expand(*rest.shape[:-1], 1)
            column = torch.where(largest[..., None] > 0, rest.gather(-1, chosen).squeeze(-1), 0.0)
            column = column / largest.clamp_min(torch.finfo(rest.dtype).tiny).sqrt()[..., None]
            rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
            columns.append(column)
            pivots.append(pivot)
        empty = rest.new_empty((*rest.shape[:-1], 0))
        factor = (torch.stack(columns, -1) if columns else empty).to(self.dtype)
        if not return_pivots:
            return factor
        return factor, torch.stack(pivots, -1) if pivots else empty[..., 0, :].long()

    def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
        """Return the diagonal, shape ``(*B, D)``; of the matrix axes and with offset 0 alone."""
        self._require_square("diagonal()")
        axes = sorted(axis % self.ndim for axis in (dim1, dim2))
        if offset != 0 or axes != [self.ndim - 2, self.ndim - 1]:
            raise NotImplementedError(
                f"diagonal() gives the main diagonal of the last two axes; got offset {offset}, axes {dim1} and {dim2}."
            )
        return self._diagonal()

    # ---- parts ------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(plain_index(index, self.shape, self.device))

    def _getitem(self, row_index: Index, col_index: Index, *batch_indices: Index | int) -> LinearOperator:
        base = self._batch_entries(batch_indices) if batch_indices else self
        size = torch.Size(self.shape[-2:])
        whole = (same_index(i, slice(None), n) for i, n in zip((row_index, col_index), size, strict=True))
        return base if all(whole) else base.select(row_index, col_index)

    def _batch_entries(self, index: tuple[Index | int, ...]) -> Any:
        """Return the entries of the batch at one index a batch axis."""
        raise NotImplementedError(f"batch entries of a {type(self).__name__}")

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        """Return single entries, by a product with a unit vector for every column that occurs."""
        rows, columns, *batch = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        result = torch.empty(rows.shape, dtype=self.dtype, device=self.device)
        wanted, where = columns.unique(return_inverse=True)
        for start in range(0, len(wanted), COLUMNS_AT_ONCE):
            part = wanted[start : start + COLUMNS_AT_ONCE]
            unit = torch.zeros((self.shape[-1], len(part)), dtype=self.dtype, device=self.device)
            unit[part, torch.arange(len(part), device=self.device)] = 1
            found = self.matmul(unit)
            here = (where >= start) & (where < start + len(part))
            entries = (*(index[here] for index in batch), rows[here], where[here] - start)
            result = result.masked_scatter(here, found[entries].to(result.dtype))
        return result

    def _diagonal(self) -> Tensor:
        everything = torch.arange(self.shape[-1], device=self.device)
        if not self.batch_shape:
            return self._get_indices(everything, everything)
        sizes = (*self.batch_shape, self.shape[-1])
        *batch, places = torch.meshgrid(*(torch.arange(n, device=self.device) for n in sizes), indexing="ij")
        return self._get_indices(places, places, *batch)

    def to_dense(self) -> Tensor:
        """Return the matrix as a dense tensor ``(*B, m, n)``."""
        eye = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        dense: Tensor = self.matmul(eye.expand(*self.batch_shape, *eye.shape))
        return dense

    # ---- small dense results -----------------------------------------------------------------------------------------

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        """Return the product entry by entry: diagonal with a diagonal matrix, else dense and small."""
        if isinstance(other, DiagLinearOperator):
            return DiagLinearOperator(self.diagonal() * other._diagonal())
        if max(self.shape[-2:]) > DENSE_SIZE:
            raise NotImplementedError(
                f"the product entry by entry with a {type(self).__name__} is computed densely, and only up to "
                f"{DENSE_SIZE} coordinates; got {tuple(self.shape)}. Multiply the dense matrices, or use @."
            )
        return DenseLinearOperator(self.to_dense() * other.to_dense())

    def sum(self, dim: int | None = None) -> Any:
        """Return the sum over ``dim``, or over all axes."""
        if dim is None:
            return self.matmul(torch.ones(self.shape[-1], 1, dtype=self.dtype, device=self.device)).sum()
        return super().sum(dim)

    def _prod_batch(self, dim: int) -> LinearOperator:
        if max(self.shape[-2:]) > DENSE_SIZE:
            raise NotImplementedError(
                f"the product entry by entry over a batch of {type(self).__name__} is computed densely, and only up to "
                f"{DENSE_SIZE} coordinates; got {tuple(self.shape)}."
            )
        return DenseLinearOperator(self.to_dense().prod(dim))

    def cat_rows(
        self,
        cross_mat: Tensor,
        new_mat: Tensor,
        generate_roots: bool = True,
        generate_inv_roots: bool = True,
        **kwargs: Any,
    ) -> LinearOperator:
        """Return the matrix with rows and columns ``cross_mat`` (*B, O, D) and ``new_mat`` (*B, O, O) appended, dense.

        Its roots are exact, and kept with it where ``generate_roots`` and ``generate_inv_roots`` say so.
        """
        dense = self._dense("cat_rows()").to(self.dtype)
        batch = torch.broadcast_shapes(dense.shape[:-2], cross_mat.shape[:-2], new_mat.shape[:-2])
        dense, cross, new = (part.expand(*batch, -1, -1) for part in (dense, cross_mat, new_mat))
        whole = torch.cat([torch.cat([dense, cross.mT], -1), torch.cat([cross, new], -1)], -2)
        result = DenseLinearOperator(whole)
        factor, info = torch.linalg.cholesky_ex(whole.double())
        if generate_roots and not bool(info.any()):
            root = TriangularLinearOperator(factor.to(self.dtype))
            add_to_cache(result, "root_decomposition", RootLinearOperator(root))
            if generate_inv_roots:
                eye = torch.eye(whole.shape[-1], dtype=torch.float64, device=self.device)
                inverse = torch.linalg.solve_triangular(factor, eye, upper=False).mT.to(self.dtype)
                add_to_cache(result, "root_inv_decomposition", RootLinearOperator(to_linear_operator(inverse)))
        return result

    # ---- copies -----------------------------------------------------------------------------------------------------

    def detach_(self) -> NoReturn:
        """Refuse: it would detach the tensors that the operator was given."""
        raise NotImplementedError("detach_() would change the tensors that this operator was made of; use detach().")

    def evaluate_kernel(self) -> Self:
        """Return the operator itself: nothing is lazy here."""
        return self
