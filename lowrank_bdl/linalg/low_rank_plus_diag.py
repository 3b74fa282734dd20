r"""The covariance of a network's weights: a low-rank-plus-diagonal linear operator, exact in every operation."""

from collections.abc import Callable
from typing import Any

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator
from torch import Tensor

from lowrank_bdl.linalg import kernels, plain
from lowrank_bdl.linalg.capacitance import Capacitance, Projection, ZeroVarianceError
from lowrank_bdl.linalg.columns import Fold
from lowrank_bdl.linalg.devices import generator_on, sums_device, to_float64
from lowrank_bdl.linalg.exact import DENSE_LIMIT_GIB, check_dense_size
from lowrank_bdl.linalg.factors import only_column, project
from lowrank_bdl.linalg.functions import InvQuadLogdetFunction, SolveFunction, apply_diagonal, apply_matmul
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.operator_structure import LowRankPlusDiagStructure
from lowrank_bdl.linalg.principal_components import principal_components
from lowrank_bdl.linalg.ridge import Ridge
from lowrank_bdl.linalg.roots import LowRankPlusDiagRoot
from lowrank_bdl.linalg.squared import SquaredLinearOperator
from lowrank_bdl.linalg.transforms import transformed
from lowrank_bdl.linalg.zero_variances import ConditionedOnZeroVariances


class LowRankPlusDiagLinearOperator(LowRankPlusDiagStructure):
    r"""The matrix :math:`\Sigma = \mathrm{diag}(d) + (R M)(R M)^\top`, never formed.

    Every operation is exact and costs O(D K) time and memory (O(D K^2) for a factorisation), whatever linear_operator's
    global settings say: no conjugate gradients, no Lanczos roots, no jitter, no second D x K tensor. The factorisation
    is kept and used again only while root, diagonal and mix are unchanged, also by in-place operations. A coordinate
    with zero diagonal and zero root is a point mass: it is left out of log-determinants and solves, and a quadratic
    form off its value is infinite. Under a root that is not zero, zero variances are no obstacle to solves, densities
    and draws as long as the matrix has an inverse.

    Args:
        root: :math:`R`, shape ``(*B, D, K)``; the transposed view of contiguous ``(K, D)`` storage is the fast layout.
            Any floating dtype, also narrower than the diagonal's [parameter].
        diag: :math:`d >= 0`, shape ``(*B, D)``, float32 or float64: the dtype of all results [parameter²].
        mix: :math:`M`, a scalar or a ``(*B, K, R)`` tensor right of the root, None for one. Scalings, centring and the
            choice of columns live here, so that none of them copies the root.
        root_scale: ``(*B, K, ceil(D / 4096))`` scales per row and block of 4,096 coordinates for a root stored in a
            narrow dtype; see `block_scaling`.

    Raises:
        ShapeError: If the shapes do not fit together.
        TypeError: If the diagonal is neither float32 nor float64.
        ValueError: If ``root_scale`` requires a gradient.

    Example:
        >>> import torch
        >>> root, diag = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([0.5, 0.25, 1.0])
        >>> sigma = LowRankPlusDiagLinearOperator(root, diag)
        >>> sigma.to_dense()
        tensor([[1.5000, 2.0000, 0.0000],
                [2.0000, 4.2500, 0.0000],
                [0.0000, 0.0000, 1.0000]])
        >>> torch.allclose(sigma.logdet(), sigma.to_dense().double().logdet())
        True
        >>> sigma.sample(4, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3])
    """

    # ---- products and solves ----------------------------------------------------------------------------------------

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Return the product with ``other``, shape ``(*B, D, S)`` or ``(D,)``. Cost: two reads of the root."""
        if isinstance(other, LinearOperator):
            product: LinearOperator = super().matmul(other)
            return product
        return self._over_columns(other, apply_matmul)

    def _matmul(self, rhs: Tensor) -> Tensor:
        result = self.matmul(rhs)
        assert isinstance(result, Tensor)
        return result

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return self._matmul(rhs)

    def _transpose_nonbatch(self) -> "LowRankPlusDiagLinearOperator":
        return self

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``Sigma^-1 right``, or ``left Sigma^-1 right``; shapes ``(*B, D, S)`` or ``(D,)``, and ``(*B, O, D)``.

        Raises:
            NotPSDError: If Sigma has no inverse, or even float64 loses it; the message says why.

        Cost: a factorisation, once, and two reads of the root, four where float64 is needed.
        """
        core = self._core
        fold = Fold(right_tensor, self.batch_shape, core.batch_shape, self.shape[-1])
        result = fold.undo(self._solve_columns(core, fold.columns.to(self.dtype)))
        return result if left_tensor is None else left_tensor @ result

    def _solve_columns(self, core: "LowRankPlusDiagLinearOperator", columns: Tensor) -> Tensor:
        if transformed():
            return plain.solve(core.factors, columns)
        try:
            capacitance, projection = self._capacitance_for(columns, None)
        except ZeroVarianceError as error:
            return ConditionedOnZeroVariances(core, error).solve(columns)
        tensors = (core.root, core.diag, core.mix, columns)
        solution: Tensor = SolveFunction.apply(core.factors, capacitance, projection, *tensors)
        return solution

    def _over_columns(self, columns: Tensor, apply: Callable[..., Tensor]) -> Tensor:
        """Fold every batch axis that the core does not have into columns, apply, and unfold."""
        core = self._core
        fold = Fold(columns, self.batch_shape, core.batch_shape, self.shape[-1])
        return fold.undo(apply(core.factors, fold.columns.to(self.dtype)))

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\mathrm{tr}(X^\top \Sigma^{-1} X)` and :math:`\log|\Sigma|`.

        Args:
            inv_quad_rhs: :math:`X`, shape ``(*B, D, S)`` or ``(D,)``; further leading axes share one factorisation.
            logdet: Whether to compute the log-determinant.
            reduce_inv_quad: Whether to sum over the S columns.

        Returns:
            Float64 tensors of shape ``(*B,)`` (or ``(*B, S)`` unreduced) and ``(*B,)``; zeros for what was not asked
            for. Sums over D come in float64, since one ulp of float32 at 10^7 nat is a nat.

        Cost: a factorisation, once, and two reads of the root.
        """
        value = log_determinant = torch.zeros((), dtype=torch.float64, device=sums_device(self.device))
        if inv_quad_rhs is None and logdet:
            empty = self.diag.new_empty((*self._core.batch_shape, self.shape[-1], 0))
            log_determinant = self._inv_quad_logdet(empty, None)[1].expand(self.batch_shape)
        elif inv_quad_rhs is not None:
            fold = Fold(inv_quad_rhs, self.batch_shape, self._core.batch_shape, self.shape[-1])
            quadratic, log_det = self._inv_quad_logdet(fold.columns, None)
            value = fold.undo(quadratic.unsqueeze(-2)).squeeze(-1 if fold.vector else -2)
            if reduce_inv_quad and not fold.vector:
                value = value.sum(-1)
            if logdet:
                log_determinant = log_det.expand(self.batch_shape)
        return value, log_determinant

    def _inv_quad_logdet(self, columns: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return quadratic forms ``(*B, S)`` of folded columns minus mean, and the log-determinant, both float64."""
        core = self._core
        if transformed():
            return plain.inv_quad_logdet(core.factors, columns, mean)
        try:
            capacitance, projection = self._capacitance_for(columns, mean)
        except ZeroVarianceError as error:
            return ConditionedOnZeroVariances(core, error).inv_quad_logdet(columns, mean)
        tensors = (core.root, core.diag, core.mix, columns) + (() if mean is None else (mean,))
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        kept: list[Ridge] = []
        quadratic, logdet = InvQuadLogdetFunction.apply(
            core.factors, capacitance, projection, kept, core.root, core.diag, core.mix, columns, mean, needs_grad
        )
        core._refine(kept[0])
        return quadratic, logdet

    def num_free(self) -> Tensor:
        """Return the number of coordinates that are not point masses, shape ``(*B,)``, float64."""
        core = self._core
        if transformed():
            return plain.num_free(core.factors).expand(self.batch_shape)
        try:
            number = core.capacitance().num_free
        except ZeroVarianceError as error:
            number = ConditionedOnZeroVariances(core, error).rest.capacitance().num_free
        return number.expand(self.batch_shape)

    def _capacitance_for(self, columns: Tensor, mean: Tensor | None) -> tuple[Capacitance, Projection | None]:
        """Return the factorisation, and the projection of a single column if a factorisation had to be made for it."""
        vector = only_column(columns)
        projection = None if vector is None else Projection(vector, mean)
        return self._core.capacitance(projection=projection), projection

    def logdet(self) -> Tensor:
        r"""Return :math:`\log|\Sigma|` over the coordinates that are not point masses, shape ``(*B,)`` [nat].

        Cost: a factorisation, once.
        """
        return self.inv_quad_logdet(logdet=True)[1]

    def _logdet(self) -> Tensor:
        return self.logdet()

    def _diagonal(self) -> Tensor:
        return apply_diagonal(self._core.factors).expand(*self.batch_shape, -1)

    def project(self, columns: Tensor) -> Tensor:
        """Return ``(R M)' X``, shape ``(*B, R, S)``, for ``columns`` X of shape ``(*B, D, S)``, in float64."""
        factors = self.factors
        if transformed() or (torch.is_grad_enabled() and (self.requires_grad or columns.requires_grad)):
            return plain.mixed_root(factors).mT @ columns.double()
        return factors.mix_transposed(project(factors, columns))

    def lift(self, columns: Tensor) -> Tensor:
        """Return ``R M Z``, shape ``(*B, D, S)``, for ``columns`` Z of shape ``(*B, R, S)``, in this dtype."""
        factors = self.factors
        inner = factors.mix_forward(to_float64(columns)).to(self.device, self.dtype)
        parts = [factors.rows(part, self.dtype).mT @ inner for part in factors.chunks()]
        return torch.cat(parts, dim=-2)

    def inverse(self) -> InverseLowRankPlusDiagLinearOperator:
        """Return the inverse as an operator, for Gaussians given by their precision. Cost: none until it is used."""
        return InverseLowRankPlusDiagLinearOperator(self)

    # ---- draws, roots, spectra --------------------------------------------------------------------------------------

    def sample(self, n: int, generator: torch.Generator | None = None, mean: Tensor | None = None) -> Tensor:
        r"""Draw n vectors from :math:`N(m, \Sigma)`, shape ``(n, *B, D)``.

        Args:
            n: Number of draws, >= 0.
            generator: Source of the normals; None means torch's default generator.
            mean: :math:`m`, shape ``(*B, D)``, None for zero.

        Cost: one read of the root and n D normals; no memory beyond the result.
        """
        if n < 0:
            raise ValueError(f"the number of draws must be >= 0, got {n}.")
        core, batch = self._core, self.batch_shape
        core._require_variances()
        extra = batch[: len(batch) - len(core.batch_shape)]
        apart = mean is not None and (bool(extra) or (torch.is_grad_enabled() and mean.requires_grad))
        if transformed() or (torch.is_grad_enabled() and core.requires_grad):
            draws = core._reparameterized(n * extra.numel(), generator)
            apart = mean is not None
        else:
            draws = kernels.draw(core.factors, n * extra.numel(), generator, None if apart else mean)
        draws = draws.reshape(n, *batch, self.shape[-1])
        return draws + mean if apart and mean is not None else draws

    def _reparameterized(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw as `kernels.draw` does, from the same stream, through plain differentiable operations."""
        _ = self.factors
        shape = (n, *self.batch_shape, self.shape[-1])
        root, generator = self._mixed_root(), generator_on(self.device, generator)
        low_rank = torch.randn(
            (*self.batch_shape, n, self.rank), dtype=self.dtype, device=self.device, generator=generator
        )
        noise = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(generator=generator)
        free = self.diag > 0  # the square root has no derivative at a point mass, which stays one
        std = torch.where(free, self.diag, 1.0).sqrt() * free
        return noise * std + (low_rank @ root.mT).movedim(-2, 0)

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Return exact draws from N(0, Sigma), shape ``(num_samples, *B, D)``; differentiable."""
        return self.sample(num_samples)

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """Return a square D x D root as an operator: exact, O(D K) a product; ``method`` is not needed."""
        return SquaredLinearOperator(LowRankPlusDiagRoot(self))

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return a square D x D root of the inverse as an operator: exact; the arguments are not needed."""
        return SquaredLinearOperator(LowRankPlusDiagRoot(self, inverse=True))

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Tensor:
        """Refuse: the symmetric inverse square root has no closed form of this structure."""
        raise NotImplementedError(
            "the symmetric inverse square root is not low-rank plus diagonal; use root_inv_decomposition() for an "
            "exact root T with T T' = Sigma^-1."
        )

    def principal_components(self, k: int, of: str = "low_rank", **options: Any) -> tuple[Tensor, Tensor]:
        """Return the top k variances ``(k,)`` and directions ``(D, k)``; see `principal_components`."""
        return principal_components(self, k, of, **options)

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, Tensor]:
        """Return eigenvalues and eigenvectors.

        Args:
            method: ``"symeig"`` or None for all of them, where the dense matrix fits; ``"lanczos"`` for the top R,
                exactly, as `principal_components` has them.
        """
        if method == "lanczos":
            return self.principal_components(min(self.rank, self.shape[-1]), of="full")
        return super().diagonalization(method)

    def to_dense(self, limit_gib: float = DENSE_LIMIT_GIB) -> Tensor:
        """Return the matrix as a dense tensor ``(*B, D, D)``.

        Args:
            limit_gib: The largest result allowed [GiB].

        Raises:
            MemoryLimitError: If the result would be larger than ``limit_gib``.
        """
        self.check_dense(limit_gib)
        _ = self.factors
        root = self._mixed_root()
        return root @ root.mT + torch.diag_embed(self.diag)

    def check_dense(self, limit_gib: float = DENSE_LIMIT_GIB) -> None:
        """Raise MemoryLimitError if the dense matrix would be larger than ``limit_gib`` [GiB]."""
        check_dense_size(self, limit_gib)


torch.serialization.add_safe_globals([LowRankPlusDiagLinearOperator])
