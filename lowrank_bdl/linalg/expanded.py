"""Operators without batch axes of their own, and the batches that `expand`, `repeat` and `unsqueeze` make of them."""

from collections.abc import Callable
from typing import Any

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.columns import Fold
from lowrank_bdl.linalg.devices import sums_device
from lowrank_bdl.linalg.indices import Index
from lowrank_bdl.linalg.squared import SquaredLinearOperator
from lowrank_bdl.linalg.structured import StructuredLinearOperator


class UnbatchedLinearOperator(StructuredLinearOperator):
    """A single matrix; batches of it are `ExpandedLinearOperator`."""

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> LinearOperator:
        shape = torch.Size(batch_shape)
        return self if shape == self.batch_shape else ExpandedLinearOperator(self, shape)

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._expand_batch(torch.Size((1,)))

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self


class ExpandedLinearOperator(StructuredLinearOperator):
    """One matrix repeated along new batch axes: every operation is done once, with the batch axes as more columns.

    Args:
        base: The matrix, without batch axes.
        batch_shape: The new axes.

    Raises:
        ShapeError: If the matrix has batch axes of its own.
    """

    def __init__(self, base: LinearOperator, batch_shape: torch.Size) -> None:
        if base.batch_shape:
            raise ShapeError(f"cannot expand batch axes {tuple(base.batch_shape)} to {tuple(batch_shape)}.")
        super().__init__(base, batch_shape=torch.Size(batch_shape))
        self.base = base
        self.expanded = torch.Size(batch_shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.base, self.expanded)

    def _size(self) -> torch.Size:
        return torch.Size((*self.expanded, *self.base.shape))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix."""
        dtype: torch.dtype = self.base.dtype
        return dtype

    def _reshaped(self, change: Callable[[Tensor], Tensor]) -> LinearOperator:
        shape = change(torch.empty(self.expanded, device="meta")).shape
        return self.base._expand_batch(shape)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> LinearOperator:
        return self._reshaped(lambda batch: batch.expand(torch.Size(batch_shape)))

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._reshaped(lambda batch: batch.unsqueeze(dim))

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self._reshaped(lambda batch: batch.permute(dims))

    def _batch_entries(self, index: tuple[Index | int, ...]) -> LinearOperator:
        plain = tuple(i.to("meta") if isinstance(i, Tensor) else i for i in index)
        return self._reshaped(lambda batch: batch[plain])

    def _sum_batch(self, dim: int) -> LinearOperator:
        count = self.expanded[dim]
        rest = torch.Size((*self.expanded[:dim], *self.expanded[dim + 1 :]))
        return (self.base * count)._expand_batch(rest)

    def _transpose_nonbatch(self) -> LinearOperator:
        return self.base.mT._expand_batch(self.expanded)

    def _over_columns(self, columns: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        fold = Fold(columns, self.expanded, torch.Size(), self.shape[-1])
        return fold.undo(apply(fold.columns))

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``, one pass for all batch entries."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._over_columns(rhs, self.base.matmul)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return the solve, one for all batch entries."""
        result = self._over_columns(right_tensor, self.base.solve)
        return result if left_tensor is None else left_tensor @ result

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        """Return quadratic forms and log-determinants, float64; see `ExactLinearOperator`."""
        value = log_determinant = torch.zeros((), dtype=torch.float64, device=sums_device(self.device))
        if inv_quad_rhs is not None:
            fold = Fold(inv_quad_rhs, self.expanded, torch.Size(), self.shape[-1])
            forms = self.base.inv_quad_logdet(fold.columns, reduce_inv_quad=False)[0]
            value = fold.undo(forms.unsqueeze(-2)).squeeze(-1 if fold.vector else -2)
            value = value.sum(-1) if reduce_inv_quad and not fold.vector else value
        if logdet:
            log_determinant = self._logdet()
        return value, log_determinant

    def _logdet(self) -> Tensor:
        value: Tensor = self.base.logdet()
        return value.expand(self.expanded)

    def _diagonal(self) -> Tensor:
        value: Tensor = self.base.diagonal()
        return value.expand(*self.expanded, -1)

    def to_dense(self) -> Tensor:
        """Return the dense matrices ``(*B, m, n)``, as a view of one."""
        dense: Tensor = self.base.to_dense()
        return dense.expand(*self.expanded, -1, -1)

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Return exact draws, independent for all batch entries, shape ``(num_samples, *B, D)``."""
        draws: Tensor = self.base.zero_mean_mvn_samples(num_samples * self.expanded.numel())
        return draws.view(num_samples, *self.expanded, self.shape[-1])

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """Return the root of the one matrix, expanded."""
        return SquaredLinearOperator(self.base.root_decomposition(method).root._expand_batch(self.expanded))

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return the root of the inverse, expanded."""
        root = self.base.root_inv_decomposition(method=method).root
        return SquaredLinearOperator(root._expand_batch(self.expanded))

    def inverse(self) -> LinearOperator:
        """Return the inverse of the one matrix, expanded."""
        return self.base.inverse()._expand_batch(self.expanded)

    def select(self, rows: Index, columns: Index) -> LinearOperator:
        """Return the block of these rows and columns; see `StructuredLinearOperator.select`."""
        block: LinearOperator = self.base[rows, :][:, columns]
        return block._expand_batch(self.expanded)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        rows, columns, *_ = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        entries: Tensor = self.base._get_indices(rows, columns)
        return entries

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        if torch.as_tensor(other).numel() == 1:
            return self.base._mul_constant(torch.as_tensor(other).squeeze())._expand_batch(self.expanded)
        return super()._mul_constant(other)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """Return the matrices with ``diag`` added; one matrix still where it is the same for all."""
        if diag.ndim <= 1 or diag.shape[:-1].numel() == 1:
            batch = torch.broadcast_shapes(self.expanded, diag.shape[:-1])
            return self.base.add_diagonal(diag.reshape(diag.shape[-1:]))._expand_batch(batch)
        return super().add_diagonal(diag)

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, ExpandedLinearOperator):
            batch = torch.broadcast_shapes(self.expanded, other.expanded)
            return (self.base + other.base)._expand_batch(batch)
        return super().__add__(other)


torch.serialization.add_safe_globals([ExpandedLinearOperator])
