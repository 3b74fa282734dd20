"""The inverse of a low-rank-plus-diagonal matrix: Gaussians that are given by their precision."""

from typing import Any

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator
from torch import Tensor
from torch.autograd.function import Function

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg.factors import inverse_std
from lowrank_bdl.linalg.operator_state import LowRankPlusDiagState
from lowrank_bdl.linalg.roots import LOST, LowRankPlusDiagRoot, apply_root_


class _InverseDiagonalFunction(Function):
    """The diagonal of the inverse, ``(1 - |L^-1 w_i|^2) / d_i`` by chunks in float64; it refuses a gradient."""

    @staticmethod
    def forward(ctx: Any, core: LowRankPlusDiagState, *tensors: Tensor) -> Tensor:
        """Compute the value, or raise NotPSDError where float64 would lose it."""
        factors, capacitance = core.factors, core.capacitance(least="double")
        result = torch.empty_like(core.diag, memory_format=torch.contiguous_format)
        lost = 0.0
        for part in factors.chunks():
            scale = inverse_std(factors.diag[..., part], torch.float64)
            rows = factors.mixed_rows(part, torch.float64) * scale.unsqueeze(-2)
            kept = 1 - torch.linalg.solve_triangular(capacitance.cholesky, rows, upper=False).square().sum(-2)
            result[..., part] = kept * scale.square()
            lost = max(lost, torch.finfo(torch.float64).eps / max(kept.min().item(), 1e-300))
        if lost > LOST:
            raise NotPSDError(
                "the diagonal of the inverse needs variances that are not too far below the deviations; float64 leaves "
                f"a relative error of about {lost:.0e} (expected at most {LOST:.0e}). Raise them with add_jitter()."
            )
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise NotImplementedError("the diagonal of the inverse has no gradient here; detach() the operator.")


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

    def __init__(self, base: LowRankPlusDiagState) -> None:
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
        product: Tensor = self.base.solve(rhs)
        return product

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return the solve: a product with Sigma."""
        result = self.base._matmul(right_tensor)
        product: Tensor = result if left_tensor is None else left_tensor @ result
        return product

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
        logdet: Tensor = -self.base.logdet()
        return logdet

    def _diagonal(self) -> Tensor:
        core = self.base._core
        result: Tensor = _InverseDiagonalFunction.apply(core, core.root, core.diag, core.mix)
        return result.expand(*self.batch_shape, -1)

    def inverse(self) -> LowRankPlusDiagState:
        """Return Sigma itself."""
        return self.base

    def sample(self, n: int, generator: torch.Generator | None = None, mean: Tensor | None = None) -> Tensor:
        r"""Draw n vectors from :math:`N(m, \Sigma^{-1})`, shape ``(n, *B, D)``, as :math:`T z` (`roots.py`).

        Args:
            n: Number of draws, >= 0.
            generator: Source of the normals; None means torch's default generator.
            mean: :math:`m`, shape ``(*B, D)``, None for zero.

        Where the matrix asks for gradients the draws are :math:`\Sigma^{-1} y` with y drawn from N(0, Sigma), which is
        differentiable: other draws of the same law.

        Cost: a factorisation, once, two reads of the root and n D normals; no memory beyond the result.
        """
        if n < 0:
            raise ValueError(f"the number of draws must be >= 0, got {n}.")
        if torch.is_grad_enabled() and self.base.requires_grad:  # y ~ N(0, Sigma) gives Sigma^-1 y ~ N(0, Sigma^-1)
            noise = self.base.sample(n, generator)
            draws: Tensor = self.base.solve(noise.movedim(0, -1)).movedim(-1, 0)
            return draws if mean is None else draws + mean
        core, batch = self.base._core, self.batch_shape
        extra = batch[: len(batch) - len(core.batch_shape)]
        shape = (n * extra.numel(), *core.diag.shape)
        result = torch.empty(shape, dtype=core.dtype, device=core.device).normal_(generator=generator)
        apply_root_(core, result.movedim(0, -1), inverse=True, transposed=False)
        result = result.view(n, *batch, self.shape[-1])
        return result if mean is None else result.add_(mean)

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
        dense: Tensor = self.base.solve(eye.expand(*self.batch_shape, *eye.shape))
        return dense
