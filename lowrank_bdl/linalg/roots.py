r"""Square D x D roots of a low-rank-plus-diagonal matrix and of its inverse.

With :math:`W = D^{-1/2} U` and :math:`W^\top W = V \Lambda V^\top`,

.. math::
    \Sigma = R R^\top, \quad R = D^{1/2} (I + W E W^\top), \quad E = V (1 + \sqrt{1 + \Lambda})^{-1} V^\top,
.. math::
    \Sigma^{-1} = T T^\top, \quad T = D^{-1/2} (I - W F W^\top), \quad
    F = V (1 + \Lambda + \sqrt{1 + \Lambda})^{-1} V^\top

(function of a low-rank update of I: Higham, Functions of Matrices, 2008, 1.8).
"""

from typing import TYPE_CHECKING

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

if TYPE_CHECKING:
    from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator


class LowRankPlusDiagRoot(LinearOperator):
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

    def __init__(self, base: "LowRankPlusDiagLinearOperator", inverse: bool = False, transposed: bool = False) -> None:
        super().__init__(base, inverse=inverse, transposed=transposed)
        self.base = base
        self.inverse_root = inverse
        self.transposed = transposed

    def _size(self) -> torch.Size:
        return torch.Size(self.base.shape)

    def _transpose_nonbatch(self) -> "LowRankPlusDiagRoot":
        return LowRankPlusDiagRoot(self.base, self.inverse_root, not self.transposed)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> "LowRankPlusDiagRoot":
        return LowRankPlusDiagRoot(self.base._expand_batch(batch_shape), self.inverse_root, self.transposed)

    def _matmul(self, rhs: Tensor) -> Tensor:
        """Return the product with ``rhs`` of shape ``(*B, D, S)``. Cost: two reads of the root."""
        base = self.base
        vector = rhs.ndim == 1
        columns = rhs.unsqueeze(-1) if vector else rhs
        diag = base.diag.unsqueeze(-1)
        inverse_std = torch.where(diag > 0, diag, 1.0).rsqrt().masked_fill(diag == 0, 0.0)
        values, vectors = torch.linalg.eigh(base.capacitance().gram)
        root = (1 + values.clamp_min(0)).sqrt()
        shrink = -1 / (root.square() + root) if self.inverse_root else 1 / (1 + root)
        inner = (vectors * shrink.unsqueeze(-2)) @ vectors.mT
        outer = inverse_std if self.inverse_root else diag.sqrt()
        # R = D^1/2 + U E W' and R' = D^1/2 + W E U'; T = D^-1/2 - D^-1 U F W' and T' = D^-1/2 - W F U' D^-1
        right, left = inverse_std, inverse_std.square() if self.inverse_root else torch.ones_like(diag)
        if self.transposed:
            left, right = right, left
        low_rank = inner @ base.project(right * columns)
        result = outer * columns + left * base.lift(low_rank)
        return result.squeeze(-1) if vector else result

    def to_dense(self) -> Tensor:
        """Return the dense root; refused where the matrix itself would be refused."""
        self.base.check_dense()
        eye = torch.eye(self.shape[-1], dtype=self.base.dtype, device=self.base.device)
        return self._matmul(eye.expand(*self.base.batch_shape, *eye.shape))
