"""The inverse of a low-rank-plus-diagonal matrix: Gaussians that are given by their precision."""

from typing import Any

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator
from torch import Tensor
from torch.autograd.function import Function

from lowrank_bdl.errors import NotPSDError, ShapeError
from lowrank_bdl.linalg import plain
from lowrank_bdl.linalg.devices import generator_on, to_float64
from lowrank_bdl.linalg.factors import LowRankFactors, inverse_std
from lowrank_bdl.linalg.indices import Index, all_distinct, positions, same_index
from lowrank_bdl.linalg.operator_state import LowRankPlusDiagState
from lowrank_bdl.linalg.operator_structure import LowRankPlusDiagStructure
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.precision_sums import add_precisions, add_to_precision, precision_block
from lowrank_bdl.linalg.roots import LOST, LowRankPlusDiagRoot, apply_root_
from lowrank_bdl.linalg.squared import SquaredLinearOperator
from lowrank_bdl.linalg.structured import StructuredLinearOperator
from lowrank_bdl.linalg.transforms import differentiable_gradients, transformed


@exact_methods
class _InverseDiagonalFunction(Function):
    """The diagonal of the inverse, ``(1 - |L^-1 w_i|^2) / d_i`` by chunks in float64."""

    @staticmethod
    def forward(ctx: Any, core: LowRankPlusDiagState, *tensors: Tensor) -> Tensor:
        """Compute the value, or raise NotPSDError where float64 would lose it."""
        factors, capacitance = core.factors, core.capacitance(least="double")
        result = torch.empty_like(core.diag, memory_format=torch.contiguous_format)
        least = factors.zeros() + 1.0
        for part in factors.chunks():
            scale = inverse_std(factors.diag[..., part], torch.float64)
            rows = factors.mixed_rows(part, torch.float64) * scale.unsqueeze(-2)
            kept = 1 - torch.linalg.solve_triangular(capacitance.cholesky, rows, upper=False).square().sum(-2)
            result[..., part] = kept * scale.square()
            least = torch.minimum(least, kept.amin(-1))
        smallest = least.min().item() if least.numel() else 1.0  # one host synchronisation, after the last chunk
        lost = torch.finfo(torch.float64).eps / max(smallest, 1e-300)
        if lost > LOST:
            raise NotPSDError(
                "the diagonal of the inverse needs variances that are not too far below the deviations; float64 leaves "
                f"a relative error of about {lost:.0e} (expected at most {LOST:.0e}). Raise them with add_jitter()."
            )
        ctx.scale = factors.scale
        ctx.save_for_backward(*tensors)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to root, diagonal and mix by plain torch operations, at the cost of D x K temporaries."""

        def diagonal(root: Tensor, diag: Tensor, mix: Tensor) -> Tensor:
            return plain.inverse_diagonal(LowRankFactors(root, diag, mix, ctx.scale))

        return None, *differentiable_gradients(diagonal, ctx.saved_tensors, (grad,), ctx.needs_input_grad[1:])


class InverseLowRankPlusDiagLinearOperator(StructuredLinearOperator):
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

    def __init__(self, base: LowRankPlusDiagStructure) -> None:
        super().__init__(base)
        self.base = base

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.base,)

    def _size(self) -> torch.Size:
        return torch.Size(self.base.shape)

    def _transpose_nonbatch(self) -> "InverseLowRankPlusDiagLinearOperator":
        return self

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> "InverseLowRankPlusDiagLinearOperator":
        return InverseLowRankPlusDiagLinearOperator(self.base._expand_batch(batch_shape))

    def _batch_entries(self, index: tuple[Index | int, ...]) -> "InverseLowRankPlusDiagLinearOperator":
        return InverseLowRankPlusDiagLinearOperator(self.base._batch_entries(index))

    def _unsqueeze_batch(self, dim: int) -> "InverseLowRankPlusDiagLinearOperator":
        return InverseLowRankPlusDiagLinearOperator(self.base._unsqueeze_batch(dim))

    def _permute_batch(self, *dims: int) -> "InverseLowRankPlusDiagLinearOperator":
        return InverseLowRankPlusDiagLinearOperator(self.base._permute_batch(*dims))

    def _repeat_batch(self, counts: torch.Size) -> "InverseLowRankPlusDiagLinearOperator":
        return InverseLowRankPlusDiagLinearOperator(self.base.repeat(*counts, 1, 1))

    def select(self, rows: Index, columns: Index) -> LinearOperator:
        """Return the block of these rows and columns: an inverse again where they agree, else a rectangular operator.

        Args:
            rows: A slice or a LongTensor ``(m,)`` of coordinates.
            columns: Likewise ``(n,)``.

        Cost: of an inverse, a read of the root and O(D K^2) time, once.
        """
        size = self.shape[-1]
        if not isinstance(rows, slice) or not isinstance(columns, slice):
            rows, columns = (positions(index, size, self.device) for index in (rows, columns))
        whole = isinstance(rows, slice) and range(size)[rows] == range(size)
        if same_index(rows, columns, size) and not whole and (isinstance(rows, slice) or all_distinct(rows, size)):
            return InverseLowRankPlusDiagLinearOperator(precision_block(self.base, rows))
        return super().select(rows, columns)

    # ---- sums and multiples -----------------------------------------------------------------------------------------

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        constant = torch.as_tensor(other, device=self.device)
        if not bool((constant > 0).all()):
            return super()._mul_constant(other)
        return InverseLowRankPlusDiagLinearOperator(self.base._mul_constant(to_float64(constant).reciprocal()))

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        r"""Return :math:`\Sigma^{-1} + E`, an inverse again where :math:`E \ge 0`.

        Args:
            diag: The diagonal of E, shape ``(*B, D)``, ``(*B, 1)`` or ``()``.

        Cost: a read of the root and a new root of its size.
        """
        if diag.ndim and diag.shape[-1] not in (1, self.shape[-1]):
            raise ShapeError(f"diag must end in 1 or {self.shape[-1]} entries; got shape {tuple(diag.shape)}.")
        if not bool((diag >= 0).all()):
            return super().add_diagonal(diag)
        return InverseLowRankPlusDiagLinearOperator(add_to_precision(self.base, diag))

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, InverseLowRankPlusDiagLinearOperator):
            total = add_precisions(self.base, other.base)
            if total is not None:
                return InverseLowRankPlusDiagLinearOperator(total)
        return super().__add__(other)

    # ---- products and solves ----------------------------------------------------------------------------------------

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Return the product with ``other``: a solve with Sigma, differentiable."""
        product: Tensor | LinearOperator
        product = super().matmul(other) if isinstance(other, LinearOperator) else self.base.solve(other)
        return product

    def _matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self.base.solve(rhs)
        return product

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return the solve: a product with Sigma."""
        result = self.base._matmul(right_tensor)
        product: Tensor = result if left_tensor is None else left_tensor @ result
        return product

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\mathrm{tr}(X^\top \Sigma X)` and :math:`-\log|\Sigma|`, float64."""
        return super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)

    def _logdet(self) -> Tensor:
        logdet: Tensor = -self.base.logdet()
        return logdet

    def _diagonal(self) -> Tensor:
        core = self.base._core
        result: Tensor
        if transformed():
            result = plain.inverse_diagonal(core.factors)
        else:
            result = _InverseDiagonalFunction.apply(core, core.root, core.diag, core.mix)
        return result.expand(*self.batch_shape, -1)

    def inverse(self) -> LowRankPlusDiagStructure:
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
        if transformed() or (
            torch.is_grad_enabled() and self.base.requires_grad
        ):  # y ~ N(0, Sigma) gives Sigma^-1 y ~ N(0, Sigma^-1)
            noise = self.base.sample(n, generator)
            draws: Tensor = self.base.solve(noise.movedim(0, -1)).movedim(-1, 0)
            return draws if mean is None else draws + mean
        core, batch = self.base._core, self.batch_shape
        extra = batch[: len(batch) - len(core.batch_shape)]
        shape = (n * extra.numel(), *core.diag.shape)
        generator = generator_on(core.device, generator)
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
        return SquaredLinearOperator(LowRankPlusDiagRoot(self.base))

    def to_dense(self) -> Tensor:
        """Return the dense inverse; refused where Sigma itself would be refused."""
        self.base.check_dense()
        eye = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        dense: Tensor = self.base.solve(eye.expand(*self.batch_shape, *eye.shape))
        return dense


torch.serialization.add_safe_globals([InverseLowRankPlusDiagLinearOperator])
