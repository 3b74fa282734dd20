r"""Matrices that are diagonal in a Kronecker product of eigenbases: a layer's covariance under K-FAC curvature.

The curvature of a layer with o outputs and m inputs is a Kronecker product :math:`G \otimes A` of an o x o and an m x m
matrix (Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015). With
:math:`G = U \mathrm{diag}(g) U^\top` and :math:`A = V \mathrm{diag}(a) V^\top`, adding :math:`\tau I` and inverting
changes eigenvalues only, which splitting :math:`\sqrt\tau` over the two factors does not.
"""

from typing import Any

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    RootLinearOperator,
)
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, NotPSDError, ShapeError
from lowrank_bdl.linalg.columns import Fold
from lowrank_bdl.linalg.devices import generator_on, require_float64
from lowrank_bdl.linalg.exact import DENSE_LIMIT_GIB, check_dense_size
from lowrank_bdl.linalg.expanded import UnbatchedLinearOperator
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.squared import SquaredLinearOperator
from lowrank_bdl.linalg.structured import ScaledLinearOperator

_DRAWS_AT_ONCE = 2**22
"""Numbers that are rotated in one product while drawing: a few draws of a small layer, one of a large one."""


class KroneckerSpectralLinearOperator(UnbatchedLinearOperator):
    r"""The matrix :math:`\Sigma = P (U \otimes V)\,\mathrm{diag}(\lambda)\,(U \otimes V)^\top P^\top`, never formed.

    :math:`U`, :math:`V` are orthogonal and :math:`\lambda > 0` is any o x m table of eigenvalues, for example
    :math:`1 / (g_i a_j + \tau)`. A grouped convolution has one such matrix a group. P puts the coordinates of all
    groups in the order of the flat parameter vector: the weight of the whole layer, row by row, and, with ``has_bias``,
    the last column of every group after it, which is the layer's bias.

    Eigenvectors and eigenvalues are float64, and so is all arithmetic but that of :meth:`sample`; results that have a
    row a coordinate come in ``result_dtype``, sums over coordinates in float64.

    Args:
        left_vectors: :math:`U`, shape ``(groups, o, o)``, eigenvectors in columns.
        right_vectors: :math:`V`, shape ``(groups, m, m)``.
        eigenvalues: :math:`\lambda > 0`, shape ``(groups, o, m)`` [parameter²].
        has_bias: Whether the last of the m columns is the bias.
        result_dtype: float32 or float64.

    Raises:
        ShapeError: If the shapes do not fit together.
        NotPSDError: If an eigenvalue is not a positive number.
        NonFiniteError: If an eigenvector is not finite.
        TypeError: If a tensor is not float64, or ``result_dtype`` is neither float32 nor float64.

    Cost: D = groups·o·m numbers, groups·(o² + m²) more; a product with one vector, a draw and a solve take
    2 D (o + m) multiplications.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)[None]
        >>> table = torch.tensor([[[1.0, 4.0], [9.0, 16.0]]], dtype=torch.float64)
        >>> sigma = KroneckerSpectralLinearOperator(eye, eye, table, has_bias=True)
        >>> sigma.diagonal()
        tensor([ 1.,  9.,  4., 16.])
        >>> sigma.logdet().exp().round()
        tensor(576., dtype=torch.float64)
        >>> sigma.sample(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        left_vectors: Tensor,
        right_vectors: Tensor,
        eigenvalues: Tensor,
        has_bias: bool = False,
        result_dtype: torch.dtype = torch.float32,
    ) -> None:
        tensors = (left_vectors, right_vectors, eigenvalues)
        if any(tensor.dtype != torch.float64 for tensor in tensors):
            found = ", ".join(str(tensor.dtype) for tensor in tensors)
            raise TypeError(f"eigenvectors and eigenvalues must be float64; got {found}.")
        if result_dtype not in (torch.float32, torch.float64):
            raise TypeError(f"result_dtype must be float32 or float64; got {result_dtype}.")
        groups, out, inner = eigenvalues.shape if eigenvalues.ndim == 3 else (0, 0, 0)
        fits = left_vectors.shape == (groups, out, out) and right_vectors.shape == (groups, inner, inner)
        if not (fits and groups and out and inner > int(has_bias)):
            raise ShapeError(
                "expected left_vectors (groups, o, o), right_vectors (groups, m, m) and eigenvalues (groups, o, m)"
                f"{', m > 1 with a bias' if has_bias else ''}; got {', '.join(str(tuple(t.shape)) for t in tensors)}."
            )
        usable = (eigenvalues > 0).all() & eigenvalues.isfinite().all()
        finite = left_vectors.isfinite().all() & right_vectors.isfinite().all()
        usable, finite = torch.stack((usable, finite)).tolist()  # one host synchronisation
        if not usable:
            raise NotPSDError(f"eigenvalues must be positive numbers; got a minimum of {eigenvalues.min().item():.3e}.")
        if not finite:
            raise NonFiniteError("eigenvectors must be finite; got NaN or infinite entries.")
        super().__init__(*tensors, has_bias=has_bias, result_dtype=result_dtype)
        self.left_vectors = left_vectors
        self.right_vectors = right_vectors
        self.eigenvalues = eigenvalues
        self.has_bias = has_bias
        self.result_dtype = result_dtype

    # ---- shape, dtype, device ---------------------------------------------------------------------------------------

    def _size(self) -> torch.Size:
        return torch.Size((self.eigenvalues.numel(),) * 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self._args, self.has_bias, self.result_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of results with a row a coordinate."""
        return self.result_dtype

    @property
    def basis(self) -> KroneckerProductLinearOperator:
        r"""The orthogonal matrix :math:`U \otimes V` of each group, shape ``(groups, o m, o m)``, sharing memory."""
        return KroneckerProductLinearOperator(self.left_vectors, self.right_vectors)

    def _with(self, eigenvalues: Tensor) -> "KroneckerSpectralLinearOperator":
        return KroneckerSpectralLinearOperator(
            self.left_vectors, self.right_vectors, eigenvalues, self.has_bias, self.result_dtype
        )

    def _transpose_nonbatch(self) -> "KroneckerSpectralLinearOperator":
        return self

    def to(self, *args: Any, **kwargs: Any) -> "KroneckerSpectralLinearOperator":
        """Move to a device, and give results in a dtype, as ``torch.Tensor.to``; what is stored stays float64."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            require_float64(device, "A Kronecker-factored operator")
        left, right = self.left_vectors.to(device=device), self.right_vectors.to(device=device)
        values = self.eigenvalues.to(device=device)
        return KroneckerSpectralLinearOperator(left, right, values, self.has_bias, dtype or self.dtype)

    def type(self, dtype: torch.dtype) -> "KroneckerSpectralLinearOperator":
        """Give results in another dtype."""
        return self.to(dtype)

    # ---- products and solves ----------------------------------------------------------------------------------------

    def _gather(self, columns: Tensor) -> Tensor:
        """Return ``(D, S)`` in flat order as ``(groups, o m, S)``: the transpose of P."""
        groups, out, inner = self.eigenvalues.shape
        if not self.has_bias:
            return columns.reshape(groups, out * inner, -1)
        weight, bias = columns.split([groups * out * (inner - 1), groups * out])
        parts = (weight.reshape(groups, out, inner - 1, -1), bias.reshape(groups, out, 1, -1))
        return torch.cat(parts, dim=2).flatten(1, 2)

    def _scatter(self, grouped: Tensor) -> Tensor:
        """Return ``(groups, o m, S)`` as ``(D, S)`` in flat order: P."""
        if not self.has_bias:
            return grouped.flatten(0, 1)
        table = grouped.unflatten(1, tuple(self.eigenvalues.shape[1:]))
        return torch.cat([table[:, :, :-1].flatten(0, 2), table[:, :, -1].flatten(0, 1)])

    def _spectral(self, columns: Tensor, values: Tensor) -> Tensor:
        """Return the product of ``columns``, shape ``(*B, D, S)`` or ``(D,)``, with the matrix of these eigenvalues."""
        if columns.ndim > 2:
            fold = Fold(columns, torch.Size(), torch.Size(), self.shape[-1])
            return fold.undo(self._spectral(fold.columns, values))
        if columns.ndim not in (1, 2) or columns.shape[0] != self.shape[-1]:
            raise ShapeError(f"expected ({self.shape[-1]}, S) or ({self.shape[-1]},); got {tuple(columns.shape)}.")
        matrix = columns.double().reshape(len(columns), -1)
        basis = self.basis
        turned = basis.mT @ self._gather(matrix)
        result = self._scatter(basis @ (turned * values.flatten(1).unsqueeze(-1)))
        return result.reshape(columns.shape).to(self.dtype)

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Return the product with ``other``, shape ``(*B, D, S)`` or ``(D,)``."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._spectral(other, self.eigenvalues)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._spectral(rhs, self.eigenvalues)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``Sigma^-1 right``, or ``left Sigma^-1 right``; shapes ``(D, S)`` or ``(D,)``, and ``(O, D)``."""
        result = self._spectral(right_tensor, self.eigenvalues.reciprocal())
        return result if left_tensor is None else left_tensor @ result

    def inverse(self) -> "KroneckerSpectralLinearOperator":
        """Return the precision matrix, sharing the eigenbases."""
        return self._with(self.eigenvalues.reciprocal())

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        constant = torch.as_tensor(other, dtype=torch.float64, device=self.device)
        if constant.ndim or not bool(constant > 0):
            return super()._mul_constant(constant.to(self.dtype))
        return self._with(self.eigenvalues * constant)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """Return Sigma + diag(``diag``): of this class where all entries are one number that leaves it definite.

        Args:
            diag: Shape ``(D,)``, ``(1,)`` or ``()``.
        """
        if diag.ndim <= 1 and diag.numel() and bool((diag == diag.flatten()[0]).all()):
            moved = self.eigenvalues + diag.flatten()[0].double()
            if diag.numel() in (1, self.shape[-1]) and bool((moved > 0).all()):
                return self._with(moved)
        return super().add_diagonal(diag)

    def __add__(self, other: Any) -> LinearOperator:
        base, factor = (other.base, other.constant) if isinstance(other, ScaledLinearOperator) else (other, 1.0)
        if isinstance(base, KroneckerSpectralLinearOperator) and self._shares_basis(base):
            total = self.eigenvalues + factor * base.eigenvalues
            if total.ndim == 3 and bool((total > 0).all()):
                return self._with(total)
        return super().__add__(other)

    def _shares_basis(self, other: "KroneckerSpectralLinearOperator") -> bool:
        if self.has_bias != other.has_bias or self.dtype != other.dtype:
            return False
        pairs = ((self.left_vectors, other.left_vectors), (self.right_vectors, other.right_vectors))
        return all(mine is theirs or torch.equal(mine, theirs) for mine, theirs in pairs)

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Any:
        r"""Return :math:`\Sigma^{-1/2} X`; with ``lhs`` L, its product with L and the diagonal of L Sigma^-1 L'."""
        result = self._spectral(rhs, self.eigenvalues.rsqrt())
        if lhs is None:
            return result
        return lhs @ result, self.inv_quad(lhs.mT, reduce_inv_quad=False).to(self.dtype)

    def _symeig(
        self, eigenvectors: bool = False, return_evals_as_lazy: bool | None = False
    ) -> tuple[Tensor, LinearOperator | None]:
        values, order = self.eigenvalues.flatten().sort()
        if not eigenvectors:
            return values.to(self.dtype), None
        check_dense_size(self, DENSE_LIMIT_GIB)
        groups, size = len(self.eigenvalues), self.eigenvalues[0].numel()
        vectors = torch.zeros((groups, size, groups, size), dtype=torch.float64, device=self.device)
        for group, basis in enumerate(self.basis.to_dense()):
            vectors[group, :, group] = basis
        dense = self._scatter(vectors.flatten(2))[:, order]
        return values.to(self.dtype), DenseLinearOperator(dense.to(self.dtype))

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\mathrm{tr}(X^\top \Sigma^{-1} X)` and :math:`\log|\Sigma|`.

        Args:
            inv_quad_rhs: :math:`X`, shape ``(D, S)`` or ``(D,)``.
            logdet: Whether to compute the log-determinant.
            reduce_inv_quad: Whether to sum over the S columns.

        Returns:
            Float64 tensors of shape ``()`` (or ``(S,)`` unreduced) and ``()``; zeros for what was not asked for.
        """
        value = log_determinant = torch.zeros((), dtype=torch.float64, device=self.device)
        if inv_quad_rhs is not None:
            if inv_quad_rhs.ndim not in (1, 2) or len(inv_quad_rhs) != self.shape[-1]:
                found = tuple(inv_quad_rhs.shape)
                raise ShapeError(f"the right-hand side must have {self.shape[-1]} rows; got {found}.")
            columns = inv_quad_rhs.double().reshape(len(inv_quad_rhs), -1)
            turned = self.basis.mT @ self._gather(columns)  # a sum of squares: nothing cancels
            value = (turned.square() / self.eigenvalues.flatten(1).unsqueeze(-1)).sum((0, 1))
            value = value.sum() if reduce_inv_quad or inv_quad_rhs.ndim == 1 else value
        if logdet:
            log_determinant = self.eigenvalues.log().sum()
        return value, log_determinant

    def logdet(self) -> Tensor:
        r"""Return :math:`\log|\Sigma|`, a float64 scalar [nat]. Cost: O(D)."""
        return self.inv_quad_logdet(logdet=True)[1]

    def _logdet(self) -> Tensor:
        return self.logdet()

    def _diagonal(self) -> Tensor:
        values = self.left_vectors.square() @ self.eigenvalues @ self.right_vectors.square().mT
        return self._scatter(values.flatten(1).unsqueeze(-1)).squeeze(-1).to(self.dtype)

    def to_dense(self) -> Tensor:
        """Return the matrix as a dense tensor ``(D, D)``.

        Raises:
            MemoryLimitError: If it does not fit the free memory.
        """
        require_memory(8 * self.shape.numel(), self.device, f"the dense {tuple(self.shape)} matrix")
        return self._matmul(torch.eye(self.shape[-1], dtype=torch.float64, device=self.device))

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        groups, out, inner = self.eigenvalues.shape
        flat = torch.arange(self.shape[-1], device=self.device, dtype=torch.float64).unsqueeze(-1)
        places = torch.empty_like(flat).squeeze(-1).long()
        places[self._gather(flat).flatten().long()] = torch.arange(self.shape[-1], device=self.device)
        rows, columns = torch.broadcast_tensors(places[row_index], places[col_index])
        values = torch.zeros(rows.shape, dtype=torch.float64, device=self.device)
        for group in range(groups):
            inside = (rows // (out * inner) == group) & (columns // (out * inner) == group)
            if bool(inside.any()):
                pairs = (rows[inside], columns[inside])
                left = torch.stack([self.left_vectors[group, pair // inner % out] for pair in pairs]).prod(0)
                right = torch.stack([self.right_vectors[group, pair % inner] for pair in pairs]).prod(0)
                values[inside] = (left @ self.eigenvalues[group] * right).sum(-1)
        return values.to(self.dtype)

    # ---- draws and roots --------------------------------------------------------------------------------------------

    def sample(self, n: int, generator: torch.Generator | None = None, mean: Tensor | None = None) -> Tensor:
        r"""Draw n vectors from :math:`N(m, \Sigma)`: :math:`m + P (U \otimes V) \sqrt\lambda \odot z`.

        Args:
            n: Number of draws, >= 0.
            generator: Source of the normals; None means torch's default generator.
            mean: :math:`m`, shape ``(D,)``, None for zero.

        Returns:
            Shape ``(n, D)``, in the operator's dtype, in which the rotation is done.

        Cost: n D normals and 2 n D (o + m) multiplications; no memory beyond the result, a copy of the eigenvectors in
        the operator's dtype and a chunk.
        """
        if n < 0:
            raise ValueError(f"the number of draws must be >= 0; got {n}.")
        shape = self.eigenvalues.shape
        generator = generator_on(self.device, generator)
        draws = torch.empty((n, self.shape[-1]), dtype=self.dtype, device=self.device).normal_(generator=generator)
        left, right = self.left_vectors.to(self.dtype), self.right_vectors.to(self.dtype)
        deviations = self.eigenvalues.sqrt().to(self.dtype)
        for part in draws.split(max(1, _DRAWS_AT_ONCE // self.shape[-1])):
            turned = left @ (part.view(-1, *shape) * deviations) @ right.mT  # (s, groups, o, m)
            part.copy_(self._scatter(turned.flatten(2).movedim(0, -1)).mT)
        return draws if mean is None else draws.add_(mean)

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Return exact draws from N(0, Sigma), shape ``(num_samples, D)``."""
        return self.sample(num_samples)

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """Return the symmetric square root as an operator, exact; ``method`` is not needed."""
        return SquaredLinearOperator(self._with(self.eigenvalues.sqrt()))

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return the symmetric square root of the inverse as an operator, exact; the arguments are not needed."""
        return SquaredLinearOperator(self._with(self.eigenvalues.rsqrt()))


def kl_kronecker(p: KroneckerSpectralLinearOperator, q: KroneckerSpectralLinearOperator, difference: Tensor) -> Tensor:
    r"""Return KL(N(m, P) || N(m + difference, Q)) exactly, a float64 scalar [nat].

    With shared eigenbases it is half the sum of :math:`r - 1 - \log r`, :math:`r = \lambda^p / \lambda^q`, in which
    nothing cancels; else :math:`\mathrm{tr}(Q^{-1} P)` comes from the squared overlaps :math:`U_q^\top U_p` and
    :math:`V_q^\top V_p` of the bases.

    Args:
        p: Covariance of the first Gaussian.
        q: Covariance of the second, of the same shape.
        difference: Difference of the means, ``(D,)``.

    Raises:
        ShapeError: If the two are not of the same shape.
    """
    if p.eigenvalues.shape != q.eigenvalues.shape or p.has_bias != q.has_bias:
        raise ShapeError(
            f"expected blocks of one shape; got {tuple(p.eigenvalues.shape)} and {tuple(q.eigenvalues.shape)}, with "
            f"biases {p.has_bias} and {q.has_bias}."
        )
    quadratic = q.inv_quad(difference)
    same = torch.equal(p.left_vectors, q.left_vectors) and torch.equal(p.right_vectors, q.right_vectors)
    if same:
        excess = (p.eigenvalues - q.eigenvalues) / q.eigenvalues
        divergence = (excess - excess.log1p()).sum()
    else:
        left = (q.left_vectors.mT @ p.left_vectors).square()
        right = (q.right_vectors.mT @ p.right_vectors).square()
        ratio = (left @ p.eigenvalues @ right.mT) / q.eigenvalues
        divergence = (ratio - 1).sum() - p.logdet() + q.logdet()
    return 0.5 * (divergence + quadratic)


torch.serialization.add_safe_globals([KroneckerSpectralLinearOperator])
