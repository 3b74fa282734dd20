"""The base of this library's operators, and what sums, multiples, products and blocks of them are.

linear_operator's own classes for these would bring its iterations back: a sum solves by conjugate gradients, a
product entry by entry goes through Lanczos roots. The classes here keep what is exact (products with vectors,
diagonals, and solves where they follow from those of the parts) and leave the rest to `ExactLinearOperator`.
"""

from collections.abc import Callable
from typing import Any

import torch
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    ZeroLinearOperator,
    to_linear_operator,
)
from torch import Tensor

from lowrank_bdl.errors import NotPSDError, ShapeError
from lowrank_bdl.linalg.devices import sums_device
from lowrank_bdl.linalg.exact import ExactLinearOperator
from lowrank_bdl.linalg.indices import Index, positions, same_index

Change = Callable[[LinearOperator], LinearOperator]


class StructuredLinearOperator(ExactLinearOperator):
    """An operator whose sums, multiples, products and parts are operators of this library again."""

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        constant = torch.as_tensor(other, device=self.device)
        if bool((constant == 0).all()):
            return ZeroLinearOperator(*self.shape, dtype=self.dtype, device=self.device)
        return ScaledLinearOperator(self, constant)

    def __neg__(self) -> LinearOperator:
        return self * -1

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, ZeroLinearOperator) or (isinstance(other, int | float) and other == 0):
            return self
        if isinstance(other, ConstantDiagLinearOperator):
            return self.add_diagonal(other.diag_values)
        if isinstance(other, DiagLinearOperator):
            return self.add_diagonal(other._diagonal())
        if not isinstance(other, LinearOperator | Tensor) or other.ndim < 2:
            raise TypeError(
                f"a {type(self).__name__} adds matrices; got {other!r}. add_jitter() and add_diagonal() add to the "
                "diagonal."
            )
        return SumOfLinearOperators(self, to_linear_operator(other))

    def __sub__(self, other: Any) -> LinearOperator:
        return self + other * -1

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """Return A + diag(``diag``), with ``diag`` of shape ``(*B, D)``, ``(*B, 1)`` or ``()``."""
        self._require_square("add_diagonal()")
        size = self.shape[-1]
        if diag.ndim and diag.shape[-1] not in (1, size):
            raise ShapeError(f"diag must end in 1 or {size} entries; got shape {tuple(diag.shape)}.")
        batch = torch.broadcast_shapes(self.batch_shape, diag.shape[:-1])
        diag = diag.to(self.dtype)
        term = DiagLinearOperator(diag.expand(*batch, size))
        return SumOfLinearOperators(self, term)

    def add_low_rank(self, low_rank_mat: Tensor | LinearOperator, *args: Any, **kwargs: Any) -> LinearOperator:
        """Return A + V V' for V of shape ``(*B, D, L)``."""
        return self + RootLinearOperator(low_rank_mat)

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``, lazily with an operator."""
        if not isinstance(other, LinearOperator):
            return super().matmul(other)
        if self.shape[-1] != other.shape[-2]:
            raise ShapeError(f"sizes must agree; got {tuple(self.shape)} and {tuple(other.shape)}.")
        return ProductOfLinearOperators(self, other)

    def rmatmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product ``other @ self``.

        Raises:
            NotImplementedError: Inside torch.compile, which passes ``A @ X`` and ``X @ A`` on as the same call.
        """
        if torch.compiler.is_compiling() and other.ndim > 1:
            raise NotImplementedError(
                "torch.compile cannot tell `operator @ X` from `X @ operator`; inside it call operator.matmul(X)."
            )
        return super().rmatmul(other)

    def _sum_batch(self, dim: int) -> LinearOperator:
        entries = ((*(slice(None),) * dim, place) for place in range(self.shape[dim]))
        return SumOfLinearOperators(*(self[index] for index in entries))

    # ---- parts ------------------------------------------------------------------------------------------------------

    def select(self, rows: Index, columns: Index) -> LinearOperator:
        """Return the block of these rows and columns, as products with the whole matrix.

        Args:
            rows: A slice or a LongTensor ``(m,)`` of coordinates.
            columns: Likewise ``(n,)``.
        """
        height, width = self.shape[-2:]
        if same_index(rows, slice(None), height) and same_index(columns, slice(None), width):
            return self
        return LinearOperatorBlock(self, positions(rows, height, self.device), positions(columns, width, self.device))

    # ---- batch axes -------------------------------------------------------------------------------------------------

    def repeat(self, *sizes: Any) -> LinearOperator:
        """Return copies along batch axes that have one entry, as a view. Sizes end in 1, 1."""
        counts = torch.Size(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
        if len(counts) < self.ndim or counts[-2:] != (1, 1):
            raise ShapeError(f"repeat takes at least {self.ndim} sizes that end in 1, 1; got {tuple(counts)}.")
        own = (1,) * (len(counts) - self.ndim) + tuple(self.batch_shape)
        if all(count == 1 or size == 1 for count, size in zip(counts[:-2], own, strict=True)):
            return self._expand_batch(torch.Size(c * s for c, s in zip(counts[:-2], own, strict=True)))
        return self._repeat_batch(counts[:-2])

    def _repeat_batch(self, counts: torch.Size) -> LinearOperator:
        """Return the operator with axes of several entries repeated: by an index, where there is no view."""
        shape = (1,) * (len(counts) - len(self.batch_shape)) + tuple(self.batch_shape)
        result = self._expand_batch(torch.Size(shape))
        for axis, (size, count) in enumerate(zip(shape, counts, strict=True)):
            if count != 1:
                places = torch.arange(size, device=self.device).repeat(count)
                index = (*(slice(None),) * axis, places)
                result = result[index]
        return result


class ComposedLinearOperator(StructuredLinearOperator):
    """An operator made of others, whose batch axes are those of its parts."""

    def _map(self, change: Change, entries: Callable[[Tensor], Tensor]) -> LinearOperator:
        """Return the operator with ``change`` applied to its parts, ``entries`` to tensors of the batch shape."""
        raise NotImplementedError

    def _batch_entries(self, index: tuple[Index | int, ...]) -> LinearOperator:
        whole = (*index, slice(None), slice(None))
        return self._map(lambda part: part[whole], lambda tensor: tensor[index])

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> LinearOperator:
        shape = torch.Size(batch_shape)
        return self._map(lambda part: part._expand_batch(shape), lambda tensor: tensor.expand(shape))

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._map(lambda part: part._unsqueeze_batch(dim), lambda tensor: tensor.unsqueeze(dim))

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self._map(lambda part: part._permute_batch(*dims), lambda tensor: tensor.permute(dims))


class ScaledLinearOperator(ComposedLinearOperator):
    """The matrix ``c A``, where A itself cannot take the factor in, for example a negative multiple of a covariance.

    Args:
        base: A.
        constant: c != 0, a scalar or of A's batch shape.
    """

    def __init__(self, base: LinearOperator, constant: Tensor) -> None:
        super().__init__(base, constant=constant)
        self.base = base
        self.constant = constant

    def _size(self) -> torch.Size:
        return torch.Size(self.base.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.base, self.constant)

    def _factor(self, axes: int) -> Tensor:
        constant = self.constant.to(self.dtype)
        return constant.view(*constant.shape, *(1,) * axes) if constant.ndim else constant

    def _map(self, change: Change, entries: Callable[[Tensor], Tensor]) -> LinearOperator:
        constant = entries(self.constant) if self.constant.ndim else self.constant
        return ScaledLinearOperator(change(self.base), constant)

    def _transpose_nonbatch(self) -> LinearOperator:
        return ScaledLinearOperator(self.base.mT, self.constant)

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        product: LinearOperator = self.base * self._per_matrix(self.constant * torch.as_tensor(other).to(self.constant))
        return product

    @staticmethod
    def _per_matrix(constant: Tensor) -> Tensor:
        return constant[..., None, None] if constant.ndim else constant

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self.base.matmul(rhs)
        return product * self._factor(1 if rhs.ndim == 1 else 2)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``A^-1 right / c``, or ``left A^-1 right / c``."""
        result: Tensor = self.base.solve(right_tensor, left_tensor)
        return result / self._factor(1 if right_tensor.ndim == 1 and left_tensor is None else 2)

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        """Return the quadratic forms of A over c, and the log-determinant; see `ExactLinearOperator`."""
        value = log_determinant = torch.zeros((), dtype=torch.float64, device=sums_device(self.device))
        if inv_quad_rhs is not None:
            forms = self.base.inv_quad_logdet(inv_quad_rhs, reduce_inv_quad=reduce_inv_quad)[0]
            unreduced = inv_quad_rhs.ndim > 1 and not reduce_inv_quad
            value = forms / self._factor(1 if unreduced else 0).double()
        return value, self._logdet() if logdet else log_determinant

    def _logdet(self) -> Tensor:
        self._require_positive_factor("logdet()")
        value: Tensor = self.base.logdet() + self.shape[-1] * self.constant.double().log()
        return value

    def _require_positive_factor(self, operation: str) -> None:
        if not bool((self.constant > 0).all()):
            raise NotPSDError(
                f"{operation} needs a positive definite matrix; this one is {self.constant.min().item():.3g} times a "
                f"{type(self.base).__name__}."
            )

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """Return the root of A times that of c."""
        self._require_positive_factor("root_decomposition()")
        return self.base.root_decomposition(method) * self._per_matrix(self.constant)

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return the root of A's inverse over that of c."""
        self._require_positive_factor("root_inv_decomposition()")
        return self.base.root_inv_decomposition(method=method) * self._per_matrix(self.constant.reciprocal())

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Return exact draws from N(0, c A), shape ``(num_samples, *B, D)``."""
        self._require_positive_factor("a draw")
        draws: Tensor = self.base.zero_mean_mvn_samples(num_samples)
        return draws * self.constant.sqrt().to(self.dtype)[..., None]

    def inverse(self) -> LinearOperator:
        """Return ``A^-1 / c``."""
        return self.base.inverse() * self._per_matrix(self.constant.reciprocal())

    def _diagonal(self) -> Tensor:
        diagonal: Tensor = self.base.diagonal()
        return diagonal * self._factor(1)

    def to_dense(self) -> Tensor:
        """Return the dense matrix."""
        dense: Tensor = self.base.to_dense()
        return dense * self._factor(2)

    def select(self, rows: Index, columns: Index) -> LinearOperator:
        """Return the block of these rows and columns; see `StructuredLinearOperator.select`."""
        block: LinearOperator = self.base[..., rows, :][..., :, columns]
        return block * self._per_matrix(self.constant)


class SumOfLinearOperators(ComposedLinearOperator):
    """The sum of matrices that have no common structure: products, diagonals and parts are those of the terms.

    Args:
        terms: Operators of one shape, up to broadcasting of batch axes. A term of another dtype is converted.

    Raises:
        ShapeError: If the shapes do not agree.
    """

    def __init__(self, *terms: LinearOperator) -> None:
        flat: list[LinearOperator] = []
        for term in terms:
            flat.extend(term.terms if isinstance(term, SumOfLinearOperators) else (term,))
        try:
            shape = torch.broadcast_shapes(*(term.shape for term in flat))
        except RuntimeError:
            shape = torch.Size()
        if any(term.shape[-2:] != shape[-2:] for term in flat):
            raise ShapeError(f"sizes must agree; got {[tuple(term.shape) for term in terms]}.")
        dtype = flat[0].dtype
        for term in flat:
            dtype = torch.promote_types(dtype, term.dtype)
        flat = [term if term.dtype == dtype else term.to(dtype) for term in flat]
        flat = [term if term.shape == shape else term._expand_batch(shape[:-2]) for term in flat]
        super().__init__(*flat)
        self.terms: tuple[LinearOperator, ...] = tuple(flat)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.terms

    def _size(self) -> torch.Size:
        return torch.Size(self.terms[0].shape)

    def _map(self, change: Change, entries: Callable[[Tensor], Tensor] = torch.Tensor.clone) -> LinearOperator:
        return SumOfLinearOperators(*(change(term) for term in self.terms))

    def _transpose_nonbatch(self) -> LinearOperator:
        return self._map(lambda term: term.mT)

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        constant = torch.as_tensor(other, device=self.device)
        if bool((constant == 0).all()):
            return super()._mul_constant(other)
        constant = constant[..., None, None] if constant.ndim else constant
        return self._map(lambda term: term * constant)

    def _total(self, values: list[Tensor]) -> Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._total([term.matmul(rhs) for term in self.terms])

    def _diagonal(self) -> Tensor:
        return self._total([term.diagonal() for term in self.terms])

    def to_dense(self) -> Tensor:
        """Return the dense matrix."""
        return self._total([term.to_dense() for term in self.terms])


class ProductOfLinearOperators(ComposedLinearOperator):
    """The product ``A B`` of two operators.

    Args:
        left: A, ``(*B, m, k)``.
        right: B, ``(*B, k, n)``.
    """

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        batch = torch.broadcast_shapes(left.batch_shape, right.batch_shape)
        left = left if left.batch_shape == batch else left._expand_batch(batch)
        right = right if right.batch_shape == batch else right._expand_batch(batch)
        super().__init__(left, right)
        self.left, self.right = left, right

    def _size(self) -> torch.Size:
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))

    def _map(self, change: Change, entries: Callable[[Tensor], Tensor]) -> LinearOperator:
        return ProductOfLinearOperators(change(self.left), change(self.right))

    def _transpose_nonbatch(self) -> LinearOperator:
        return ProductOfLinearOperators(self.right.mT, self.left.mT)

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.ndim == 1:  # what the right factor makes of it may have batch axes, and is then no vector
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        product: Tensor = self.left.matmul(self.right.matmul(rhs))
        return product

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``B^-1 A^-1 right``, or ``left B^-1 A^-1 right``, of square factors."""
        if not (self.left.is_square and self.right.is_square):
            return super().solve(right_tensor, left_tensor)
        columns = right_tensor.unsqueeze(-1) if right_tensor.ndim == 1 else right_tensor
        result: Tensor = self.right.solve(self.left.solve(columns))
        result = result.squeeze(-1) if right_tensor.ndim == 1 else result
        return result if left_tensor is None else left_tensor @ result


class LinearOperatorBlock(ComposedLinearOperator):
    r"""The block ``A[rows, columns]``: what ``A[rows]`` is until ``[:, columns]`` makes it square again.

    Args:
        base: The matrix A, shape ``(*B, m, n)``.
        rows: Coordinates of the rows, ``(r,)``.
        columns: Coordinates of the columns, ``(c,)``.
    """

    def __init__(self, base: StructuredLinearOperator, rows: Tensor, columns: Tensor) -> None:
        super().__init__(base, rows=rows, columns=columns)
        self.base = base
        self.rows = rows
        self.columns = columns

    def _size(self) -> torch.Size:
        return torch.Size((*self.base.batch_shape, len(self.rows), len(self.columns)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the whole matrix."""
        dtype: torch.dtype = self.base.dtype
        return dtype

    def _map(self, change: Change, entries: Callable[[Tensor], Tensor]) -> LinearOperator:
        return LinearOperatorBlock(change(self.base), self.rows, self.columns)

    def _transpose_nonbatch(self) -> "LinearOperatorBlock":
        return LinearOperatorBlock(self.base.mT, self.columns, self.rows)

    def to(self, *args: Any, **kwargs: Any) -> "LinearOperatorBlock":
        """Move to a device and compute in a dtype, as ``torch.Tensor.to``; coordinates stay integers."""
        base = self.base.to(*args, **kwargs)
        return LinearOperatorBlock(base, self.rows.to(base.device), self.columns.to(base.device))

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``, directly: linear_operator's way would rebuild and refactorise the base."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        """Return the product with ``rhs`` of shape ``(*B, n, S)``: embed in all coordinates, multiply, select."""
        vector = rhs.ndim == 1
        columns = rhs.unsqueeze(-1) if vector else rhs
        shape = (*columns.shape[:-2], self.base.shape[-1], columns.shape[-1])
        embedded = columns.new_zeros(shape).index_add(-2, self.columns, columns)
        result: Tensor = self.base.matmul(embedded).index_select(-2, self.rows)
        return result.squeeze(-1) if vector else result

    def select(self, rows: Index, columns: Index) -> LinearOperator:
        """Return a block of the block: of the whole matrix, with the class that this gives."""
        return self.base.select(self.rows[rows], self.columns[columns])

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        return self.base._get_indices(self.rows[row_index], self.columns[col_index], *batch_indices)

    def to_dense(self) -> Tensor:
        """Return the block as a dense tensor ``(*B, m, n)``."""
        if len(self.rows) < len(self.columns):
            return self._transpose_nonbatch().to_dense().mT
        return super().to_dense()


torch.serialization.add_safe_globals([ScaledLinearOperator, SumOfLinearOperators])
