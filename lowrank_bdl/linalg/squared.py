"""Matrices that are given by a square root with structure, as `root_decomposition` returns them."""

from collections.abc import Callable
from typing import Any

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator
from torch import Tensor

from lowrank_bdl.linalg.structured import Change, ComposedLinearOperator, StructuredLinearOperator


class SquaredLinearOperator(ComposedLinearOperator, RootLinearOperator):
    """The matrix ``R R'`` of a square root R that is an operator of this library: what `root_decomposition` returns.

    Args:
        root: R, ``(*B, D, D)``.
    """

    def __init__(self, root: LinearOperator) -> None:
        LinearOperator.__init__(self, root)
        self.root = root

    def _size(self) -> torch.Size:
        return torch.Size(self.root.shape)

    def _map(self, change: Change, entries: Callable[[Tensor], Tensor]) -> LinearOperator:
        return SquaredLinearOperator(change(self.root))

    def _transpose_nonbatch(self) -> "SquaredLinearOperator":
        return self

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        constant = torch.as_tensor(other, device=self.device)
        if not bool((constant > 0).all()):
            return super()._mul_constant(other)
        return SquaredLinearOperator(self.root._mul_constant(constant.sqrt()))

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        columns = rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs
        product: Tensor = self.root.matmul(self.root.mT.matmul(columns))
        return product.squeeze(-1) if rhs.ndim == 1 else product

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``A^-1 right``, or ``left A^-1 right``, by two solves with the root."""
        columns = right_tensor.unsqueeze(-1) if right_tensor.ndim == 1 else right_tensor
        result: Tensor = self.root.mT.solve(self.root.solve(columns))
        result = result.squeeze(-1) if right_tensor.ndim == 1 else result
        return result if left_tensor is None else left_tensor @ result

    def _logdet(self) -> Tensor:
        value: Tensor = 2 * self.root.logdet()
        return value

    def root_decomposition(self, method: str | None = None) -> "SquaredLinearOperator":
        """Return the operator itself."""
        return self

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return the square of the transposed inverse of the root."""
        return SquaredLinearOperator(self.root.inverse().mT)

    def inverse(self) -> LinearOperator:
        """Return the inverse, by that of the root."""
        return self.root_inv_decomposition()

    def to_dense(self) -> Tensor:
        """Return the dense matrix."""
        root: Tensor = self.root.to_dense()
        return root @ root.mT

    def _diagonal(self) -> Tensor:
        return StructuredLinearOperator._diagonal(self)
