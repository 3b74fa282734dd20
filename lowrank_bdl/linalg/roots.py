r"""Square D x D roots of a low-rank-plus-diagonal matrix and of its inverse.

With :math:`W = D^{-1/2} U` and :math:`W^\top W = V \Lambda V^\top`,

.. math::
    \Sigma = R R^\top, \quad R = D^{1/2} (I + W E W^\top), \quad E = V (1 + \sqrt{1 + \Lambda})^{-1} V^\top,
.. math::
    \Sigma^{-1} = T T^\top, \quad T = D^{-1/2} (I - W F W^\top), \quad
    F = V (1 + \Lambda + \sqrt{1 + \Lambda})^{-1} V^\top

(function of a low-rank update of I: Higham, Functions of Matrices, 2008, 1.8).
"""

from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from torch.autograd.function import Function

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg import plain
from lowrank_bdl.linalg.columns import Fold
from lowrank_bdl.linalg.devices import in_dtype, to_float64
from lowrank_bdl.linalg.factors import LowRankFactors, inverse_std
from lowrank_bdl.linalg.indices import Index
from lowrank_bdl.linalg.operator_state import LowRankPlusDiagState
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.structured import StructuredLinearOperator
from lowrank_bdl.linalg.transforms import backward_is_transformed, differentiable_gradients, transformed

LOST = 1e-3
"""Largest estimated relative error with which a root is applied."""


def apply_root_(core: LowRankPlusDiagState, columns: Tensor, inverse: bool, transposed: bool) -> Tensor:
    r"""Multiply ``columns`` (*B, D, S) in place by the root R, or by T, or by their transposes.

    Both are :math:`D^{\pm 1/2} (I \pm W G W^\top)`. The products are taken in the storage dtype while W is mild enough
    for it, in float64 otherwise.

    Raises:
        NotPSDError: If float64 would lose the root: some variances are too far below their deviations.

    Cost: a factorisation in float64, once, and two reads of the root; no memory beyond a chunk.
    """
    factors, capacitance = core.factors, core.capacitance(least="double")
    values, vectors = torch.linalg.eigh(capacitance.gram)
    values = values.clamp_min(0)
    # T subtracts what lies along W, down to 1 / |W| of it; R adds, and loses only what the Gram matrix loses
    size = values.max().sqrt().item() if values.numel() else 0.0
    spread = size if inverse else max(capacitance.amplification, 0.0)
    dtype = core.dtype if torch.finfo(core.dtype).eps * spread < LOST else torch.float64
    if not torch.finfo(dtype).eps * spread < LOST:
        raise NotPSDError(
            "a root needs variances that are not too far below the deviations; the smallest here is "
            f"{factors.diag[factors.diag > 0].min().item():.1e}. Raise them with add_jitter()."
        )
    root = (1 + values).sqrt()
    shrink = -1 / (root.square() + root) if inverse else 1 / (1 + root)
    inner = (vectors * shrink.unsqueeze(-2)) @ vectors.mT
    total = factors.zeros(factors.root.shape[-1], columns.shape[-1])
    for part in factors.chunks():
        scale = inverse_std(factors.diag[..., part], dtype).unsqueeze(-1)
        chunk = columns[..., part, :]
        if transposed:
            chunk.mul_(scale if inverse else factors.diag[..., part, None].sqrt())
        total += to_float64(factors.rows(part, dtype) @ (chunk * scale))
    inner = in_dtype(factors.mix_forward(inner @ factors.mix_transposed(total)), dtype, columns.device)
    for part in factors.chunks():
        scale = inverse_std(factors.diag[..., part], dtype).unsqueeze(-1)
        chunk = columns[..., part, :]
        result = chunk + (factors.rows(part, dtype).mT @ inner).mul_(scale)
        if not transposed:
            result *= scale if inverse else factors.diag[..., part, None].to(dtype).sqrt()
        chunk.copy_(result)
    return columns


@exact_methods
class _RootFunction(Function):
    """A product with a root, differentiable in the matrix and the right-hand side."""

    @staticmethod
    def forward(
        ctx: Any,
        core: LowRankPlusDiagState,
        inverse: bool,
        transposed: bool,
        columns: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        """Compute the value."""
        ctx.core, ctx.inverse, ctx.transposed = core, inverse, transposed
        ctx.save_for_backward(columns, *tensors)
        return apply_root_(core, columns.clone(memory_format=torch.contiguous_format), inverse, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to the right-hand side and, by plain torch operations, to the matrix."""
        columns, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if any(needs[1:]) or backward_is_transformed(grad):
            scale = ctx.core.root_scale

            def product(columns: Tensor, root: Tensor, diag: Tensor, mix: Tensor) -> Tensor:
                factors = LowRankFactors(root, diag, mix, scale)
                return plain.root_matmul(factors, columns, ctx.inverse, ctx.transposed)

            return None, None, None, *differentiable_gradients(product, (columns, *tensors), (grad,), needs)
        grad = grad.clone(memory_format=torch.contiguous_format)
        result = apply_root_(ctx.core, grad, ctx.inverse, not ctx.transposed)
        return None, None, None, result, None, None, None


class LowRankPlusDiagRoot(StructuredLinearOperator):
    r"""The root R (or T for the inverse) of a `LowRankPlusDiagLinearOperator`, a D x D operator with O(D K) products.

    Args:
        base: The matrix Sigma, shape ``(*B, D, D)``.
        inverse: Whether this is a root of the inverse of Sigma.
        transposed: Whether this is the transpose of that root.

    Example:
        >>> import torch
        >>> from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
        >>> sigma = LowRankPlusDiagLinearOperator(torch.ones(3, 1).double(), torch.ones(3).double())
        >>> root = LowRankPlusDiagRoot(sigma).to_dense()
        >>> torch.allclose(root @ root.mT, sigma.to_dense())
        True
    """

    def __init__(self, base: LowRankPlusDiagState, inverse: bool = False, transposed: bool = False) -> None:
        super().__init__(base, inverse=inverse, transposed=transposed)
        self.base = base
        self.inverse_root = inverse
        self.transposed = transposed

    def _size(self) -> torch.Size:
        return torch.Size(self.base.shape)

    def _transpose_nonbatch(self) -> "LowRankPlusDiagRoot":
        return LowRankPlusDiagRoot(self.base, self.inverse_root, not self.transposed)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> "LowRankPlusDiagRoot":
        return self._of(self.base._expand_batch(batch_shape))

    def _of(self, base: LowRankPlusDiagState) -> "LowRankPlusDiagRoot":
        return LowRankPlusDiagRoot(base, self.inverse_root, self.transposed)

    def _batch_entries(self, index: tuple[Index | int, ...]) -> "LowRankPlusDiagRoot":
        return self._of(self.base[index])

    def _unsqueeze_batch(self, dim: int) -> "LowRankPlusDiagRoot":
        return self._of(self.base._unsqueeze_batch(dim))

    def _permute_batch(self, *dims: int) -> "LowRankPlusDiagRoot":
        return self._of(self.base._permute_batch(*dims))

    def inverse(self) -> "LowRankPlusDiagRoot":
        """Return the inverse of the root: the transposed root of the inverse, since T' R = I."""
        return LowRankPlusDiagRoot(self.base, not self.inverse_root, not self.transposed)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``R^-1 right``, or ``left R^-1 right``: a product with the transposed root of the inverse."""
        result = self.inverse()._matmul(right_tensor)
        return result if left_tensor is None else left_tensor @ result

    def _logdet(self) -> Tensor:
        value: Tensor = self.base.logdet() / 2
        return -value if self.inverse_root else value

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``, directly: linear_operator's way would rebuild and refactorise the base."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        """Return the product with ``rhs`` of shape ``(*B, D, S)``. Cost: two reads of the root.

        Differentiable in ``rhs`` and the matrix; gradients to the matrix take a D x K temporary or more in float64.
        """
        core = self.base._core
        fold = Fold(rhs, self.base.batch_shape, core.batch_shape, core.shape[-1])
        columns = fold.columns.to(core.dtype)
        if transformed():
            return fold.undo(plain.root_matmul(core.factors, columns, self.inverse_root, self.transposed))
        tensors = (core.root, core.diag, core.mix)
        return fold.undo(_RootFunction.apply(core, self.inverse_root, self.transposed, columns, *tensors))

    def to_dense(self) -> Tensor:
        """Return the dense root; refused where the matrix itself would be refused."""
        self.base.check_dense()
        eye = torch.eye(self.shape[-1], dtype=self.base.dtype, device=self.base.device)
        return self._matmul(eye.expand(*self.base.batch_shape, *eye.shape))
