"""The inverse of a low-rank-plus-diagonal matrix: Gaussians that are given by their precision."""

from typing import TYPE_CHECKING, Any

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator
from torch import Tensor

from lowrank_bdl.linalg.factors import inverse_std
from lowrank_bdl.linalg.kernels import lift_
from lowrank_bdl.linalg.roots import LowRankPlusDiagRoot

if TYPE_CHECKING:
    from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator


class InverseLowRankPlusDiagLinearOperator(LinearOperator):
    r"""The matrix :math:`\Sigma^{-1}` for a low-rank-plus-diagonal :math:`\Sigma`, exact in every operation.

    Its products are solves with :math:`\Sigma` and its solves products, its draws have covariance :math:`\Sigma^{-1}`.
    At point masses of :math:`\Sigma` it is zero (the pseudo-inverse).

    Args:
        base: :math:`\Sigma`, shape ``(*B, D, D)``.

    Example:
        >>> import torch
        >>> from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
        >>> precision = LowRankPlusDiagLinearOperator(torch.ones(2, 1).double(), torch.ones(2).double())
        >>> precision.inverse().to_dense()
        tensor([[ 0.6667, -0.3333],
                [-0.3333,  0.6667]], dtype=torch.float64)
    """

    def __init__(self, base: "LowRankPlusDiagLinearOperator") -> None:
        super().__init__(base)
        self.base = base

    def _size(self) -> torch.Size:
        return torch.Size(self.base.shape)

    def _transpose_nonbatch(self) -> "InverseLowRankPlusDiagLinearOperator":
        return self

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> "InverseLowRankPlusDiagLinearOperator":
        return InverseLowRankPlusDiagLinearOperator(self.base._expand_batch(batch_shape))

    def evaluate_kernel(self) -> "InverseLowRankPlusDiagLinearOperator":
        """Return the operator itself."""
        return self

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Return the product with ``other``: a solve with Sigma, differentiable."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self.base.solve(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.base.solve(rhs)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return the solve: a product with Sigma."""
        result = self.base._matmul(right_tensor)
        return result if left_tensor is None else left_tensor @ result

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Tensor:
        return self.solve(rhs)

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\mathrm{tr}(X^\top \Sigma X)` and :math:`-\log|\Sigma|`, float64."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        value, log_determinant = zero, zero
        if inv_quad_rhs is not None:
            product = self.solve(inv_quad_rhs).double() * inv_quad_rhs
            value = product.sum(-1 if inv_quad_rhs.ndim == 1 else -2)
            if reduce_inv_quad and inv_quad_rhs.ndim > 1:
                value = value.sum(-1)
        if logdet:
            log_determinant = -self.base.logdet()
        return value, log_determinant

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        r"""Return :math:`\mathrm{tr}(X^\top \Sigma X)`."""
        return self.inv_quad_logdet(inv_quad_rhs, reduce_inv_quad=reduce_inv_quad)[0]

    def logdet(self) -> Tensor:
        r"""Return :math:`-\log|\Sigma|`."""
        return -self.base.logdet()

    def _diagonal(self) -> Tensor:
        """Return ``(1 - |L^-1 w_i|^2) / d_i`` by chunks in float64."""
        base = self.base
        factors, capacitance = base.factors, base.capacitance()
        result = torch.empty_like(base.diag, memory_format=torch.contiguous_format)
        for part in factors.chunks():
            scale = inverse_std(base.diag[..., part], torch.float64)
            rows = factors.mixed_rows(part, torch.float64) * scale.unsqueeze(-2)
            leverage = torch.linalg.solve_triangular(capacitance.cholesky, rows, upper=False).square().sum(-2)
            result[..., part] = (1 - leverage).mul_(scale.square())
        return result

    def inverse(self) -> "LowRankPlusDiagLinearOperator":
        """Return Sigma itself."""
        return self.base

    def sample(self, n: int, generator: torch.Generator | None = None, mean: Tensor | None = None) -> Tensor:
        r"""Draw n vectors from :math:`N(m, \Sigma^{-1})`, shape ``(n, *B, D)``, as :math:`T z` (`roots.py`).

        Args:
            n: Number of draws, >= 0.
            generator: Source of the normals; None means torch's default generator.
            mean: :math:`m`, shape ``(*B, D)``, None for zero.

        Cost: a factorisation, once, two reads of the root and n D normals; no memory beyond the result.
        """
        if n < 0:
            raise ValueError(f"the number of draws must be >= 0, got {n}.")
        base = self.base
        factors, dtype = base.factors, base.dtype
        result = torch.empty((n, *base.diag.shape), dtype=dtype, device=base.device).normal_(generator=generator)
        columns = result.movedim(0, -1)  # (*B, D, n)
        scaled = factors.zeros(factors.root.shape[-1], n)
        for part in factors.chunks():
            scale = inverse_std(base.diag[..., part], dtype).unsqueeze(-1)
            scaled += (factors.rows(part, dtype) @ (columns[..., part, :] * scale)).double()
        values, vectors = torch.linalg.eigh(base.capacitance().gram)
        root = (1 + values.clamp_min(0)).sqrt().unsqueeze(-1)
        inner = vectors @ ((vectors.mT @ factors.mix_transposed(scaled)) / (root.square() + root))
        inner = factors.mix_forward(inner).to(dtype)
        for part in factors.chunks():
            scale = inverse_std(base.diag[..., part], dtype).unsqueeze(-1)
            chunk = columns[..., part, :]
            low_rank = torch.zeros_like(chunk)
            lift_(low_rank, factors.rows(part, dtype), inner)
            chunk.sub_(low_rank.mul_(scale)).mul_(scale)
            if mean is not None:
                chunk += mean[..., part, None]
        return result

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Return exact draws from N(0, Sigma^-1), shape ``(num_samples, *B, D)``."""
        return self.sample(num_samples)

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """Return a square root of the inverse as an operator."""
        return self.base.root_inv_decomposition()

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return a square root of Sigma as an operator."""
        return RootLinearOperator(LowRankPlusDiagRoot(self.base))

    def to_dense(self) -> Tensor:
        """Return the dense inverse; refused where Sigma itself would be refused."""
        self.base.check_dense()
        eye = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        return self.base.solve(eye.expand(*self.batch_shape, *eye.shape))
