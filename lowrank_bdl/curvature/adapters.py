"""Operators for SciPy's eigensolvers, and operators of curvlinops for ours."""

from typing import Any, Protocol

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.expanded import UnbatchedLinearOperator


def to_scipy(operator: LinearOperator) -> Any:
    """Return a ``scipy.sparse.linalg.LinearOperator``, for SciPy's ``eigsh`` and others.

    Args:
        operator: Any linear operator without batch axes, on any device; products are computed there.

    Returns:
        A SciPy operator of the same shape; its dtype is NumPy's name for the operator's, float32 for one of half
        precision. Vectors of other dtypes are cast.

    Raises:
        ShapeError: If the operator has batch axes.
        ImportError: If SciPy is not installed.

    Cost: a product, and a copy of the vectors to the operator's device and back.

    Example:
        >>> from linear_operator.operators import DiagLinearOperator
        >>> import scipy.sparse.linalg
        >>> values = scipy.sparse.linalg.eigsh(to_scipy(DiagLinearOperator(torch.arange(9.0))), 2)[0]
        >>> values.round(4)
        array([7., 8.], dtype=float32)
    """
    if operator.ndim != 2:
        raise ShapeError(f"SciPy's operators are matrices; expected shape (m, n), got {tuple(operator.shape)}.")
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator  # type: ignore[import-untyped]

    dtype, device = operator.dtype, operator.device
    wide = torch.promote_types(dtype, torch.float32)

    def product(matrix: LinearOperator, vectors: Any) -> Any:
        columns = torch.from_numpy(np.ascontiguousarray(vectors)).to(device=device, dtype=dtype)
        return matrix.matmul(columns).detach().to(device="cpu", dtype=wide).numpy()

    def forward(vectors: Any) -> Any:
        return product(operator, vectors)

    def adjoint(vectors: Any) -> Any:
        return product(operator.mT, vectors)

    return ScipyLinearOperator(
        tuple(operator.shape),
        matvec=forward,
        matmat=forward,
        rmatvec=adjoint,
        rmatmat=adjoint,
        dtype=np.float64 if wide is torch.float64 else np.float32,
    )


class _Foreign(Protocol):
    """What is used of a curvlinops operator."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    SELF_ADJOINT: bool

    def __matmul__(self, other: Tensor) -> Tensor: ...

    def adjoint(self) -> "_Foreign": ...


class ForeignLinearOperator(UnbatchedLinearOperator):
    """An operator of another library, as :func:`from_curvlinops` makes it.

    Args:
        place: A tensor of the operator's dtype and device.
        operator: The operator.
    """

    def __init__(self, place: Tensor, operator: _Foreign) -> None:
        super().__init__(place, operator=operator)
        self.operator = operator

    def _size(self) -> torch.Size:
        return torch.Size(self.operator.shape)

    def _matmul(self, rhs: Tensor) -> Tensor:
        columns = rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs
        flat = columns.detach().movedim(-2, 0).reshape(columns.shape[-2], -1)
        result = (self.operator @ flat).detach()
        result = result.view(-1, *columns.shape[:-2], columns.shape[-1]).movedim(0, -2)
        return result.squeeze(-1) if rhs.ndim == 1 else result

    def _transpose_nonbatch(self) -> "ForeignLinearOperator":
        if self.operator.SELF_ADJOINT:
            return self
        return ForeignLinearOperator(self._args[0], self.operator.adjoint())


def from_curvlinops(operator: Any) -> ForeignLinearOperator:
    """Return a curvlinops operator as one of linear_operator, for sums, multiples and the eigensolvers here.

    Nothing is imported: whatever has the attributes ``shape``, ``dtype``, ``device`` and ``SELF_ADJOINT``, multiplies
    tensors ``(n,)`` and ``(n, K)`` by ``@`` and has an ``adjoint()`` will do. The coordinates stay those of the
    operator: all parameters in the order in which it was given them.

    Args:
        operator: The operator, (m, n).

    Returns:
        The same matrix.

    Raises:
        TypeError: If one of these attributes is missing.

    Cost: that of its products.

    Example:
        >>> class Doubled:
        ...     shape, dtype, device, SELF_ADJOINT = (3, 3), torch.float32, torch.device("cpu"), True
        ...     def __matmul__(self, vectors):
        ...         return 2 * vectors
        ...     def adjoint(self):
        ...         return self
        >>> (from_curvlinops(Doubled()) * 0.5) @ torch.ones(3)
        tensor([1., 1., 1.])
    """
    for name in ("shape", "dtype", "device", "SELF_ADJOINT", "__matmul__", "adjoint"):
        if not hasattr(operator, name):
            raise TypeError(f"expected an operator of curvlinops, with an attribute {name!r}; got {type(operator)}.")
    return ForeignLinearOperator(torch.empty(0, dtype=operator.dtype, device=operator.device), operator)
