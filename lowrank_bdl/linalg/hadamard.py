r"""The Walsh-Hadamard transform, and random directions made of it that take no D x k storage.

Dense random directions cost k·D numbers. A product of Hadamard matrices and random signs has entries of the same mean,
variance and, nearly, law, and is stored as its signs: Yu, Suresh, Choromanski, Holtmann-Rice and Kumar, "Orthogonal
Random Features" (NeurIPS 2016), section 4; Le, Sarlos and Smola, "Fastfood" (ICML 2013) is the same idea.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import generator_on
from lowrank_bdl.linalg.expanded import UnbatchedLinearOperator
from lowrank_bdl.linalg.precision import exact

RADIX = 16
"""Axis that one matrix product transforms: log2(n) / 4 passes over the vector, at the speed of memory."""
GATHERED = 2**20
"""Entries of the matrix that are made at once for its Gram matrix."""


@exact
def hadamard_transform(x: Tensor) -> Tensor:
    r"""Return :math:`H x` along the last axis, with :math:`H_{ij} = (-1)^{\langle i, j \rangle}` over binary digits.

    Args:
        x: Shape ``(*B, n)``, n a power of two, floating dtype.

    Returns:
        Shape ``(*B, n)``; applied twice it gives n times x. Differentiable, and a map that vmap takes.

    Raises:
        ShapeError: If n is no power of two.

    Cost: O(n log n), and two temporaries of the size of x.

    Example:
        >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([10., -2., -4.,  0.])
    """
    n = x.shape[-1] if x.ndim else 0
    if n < 1 or n & (n - 1):
        raise ShapeError(f"the last axis must be a power of two; got shape {tuple(x.shape)}.")
    shape, inner = x.shape, 1
    while inner < n:
        radix = min(RADIX, n // inner)
        matrix = _hadamard_matrix(radix, x)
        x = x.reshape(-1, radix) @ matrix if inner == 1 else matrix @ x.reshape(-1, radix, inner)
        inner *= radix
    return x.reshape(shape)


def _hadamard_matrix(n: int, like: Tensor) -> Tensor:
    matrix = torch.ones((1, 1), dtype=like.dtype, device=like.device)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


class RandomizedHadamardLinearOperator(UnbatchedLinearOperator):
    r"""Random directions :math:`P = n^{-1/2} (\mathrm{diag}(s)\, H\, \mathrm{diag}(u)\, H)_{1..D,\,c}\, M`, D x r.

    H is the n x n Hadamard matrix with :math:`D \le n < 2 D`, s and u are random signs, and c chooses k of its columns.
    Over random signs and columns the entries of P (for M of random signs on the diagonal) have mean 0 and covariance
    exactly the identity, each entry is a sum of n signs and so nearly normal, and columns are orthogonal up to the part
    of H that is cut off: exactly where D = n, else to about :math:`D^{-1/2}`, as independent normals are.

    Args:
        inner_signs: u, shape ``(n,)``, int8, each 1 or -1.
        outer_signs: s, shape ``(D,)``, int8, each 1 or -1.
        columns: c, shape ``(k,)``, int64, each in [0, n).
        mix: M, shape ``(k, r)``, float32 or float64: its dtype is that of the operator.

    Raises:
        ShapeError: If the shapes do not fit together, or a column is out of range.
        TypeError: If a dtype is another, or a sign is not 1 or -1.

    Cost: D + n bytes of storage; a product takes O(D log D) time and a few temporaries of n numbers a column.

    Example:
        >>> basis = RandomizedHadamardLinearOperator.random(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> basis.matmul(torch.ones(3, 5)).shape, basis.mT.matmul(torch.ones(1000)).shape
        (torch.Size([1000, 5]), torch.Size([3]))
    """

    def __init__(self, inner_signs: Tensor, outer_signs: Tensor, columns: Tensor, mix: Tensor) -> None:
        n, dim = inner_signs.shape[-1], outer_signs.shape[-1]
        if (inner_signs.ndim, outer_signs.ndim, columns.ndim, mix.ndim) != (1, 1, 1, 2) or not 1 <= dim <= n:
            shapes = [tuple(t.shape) for t in (inner_signs, outer_signs, columns, mix)]
            raise ShapeError(f"expected signs (n,) and (D,) with D <= n, columns (k,) and mix (k, r); got {shapes}.")
        if n & (n - 1) or len(columns) != len(mix):
            raise ShapeError(f"n must be a power of two, and mix (k, r) for k columns; got {n}, {tuple(mix.shape)}.")
        if not (inner_signs.dtype == outer_signs.dtype == torch.int8 and columns.dtype == torch.int64):
            raise TypeError(f"signs must be int8 and columns int64; got {inner_signs.dtype}, {columns.dtype}.")
        if mix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"mix must be float32 or float64; got {mix.dtype}.")
        if len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < n):
            raise ShapeError(f"columns must be in [0, {n}); got {int(columns.min())} to {int(columns.max())}.")
        if not all(bool((signs.abs() == 1).all()) for signs in (inner_signs, outer_signs)):
            raise TypeError("signs must be 1 or -1; got another number.")
        super().__init__(inner_signs, outer_signs, columns, mix)
        self.inner_signs, self.outer_signs, self.columns, self.mix = inner_signs, outer_signs, columns, mix

    @classmethod
    def random(
        cls,
        dim: int,
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Draw signs and columns.

        Args:
            dim: D >= 1.
            rank: k, at least 1 and at most D.
            dtype: Of the operator.
            device: Where it lives.
            generator: Source of the randomness; None means torch's default generator.

        Raises:
            ShapeError: If ``rank`` is out of range.
        """
        if not 1 <= rank <= dim:
            raise ShapeError(f"rank must be between 1 and D = {dim}; got {rank}.")
        n = 1 << (dim - 1).bit_length()
        generator = generator_on(torch.empty(0, device=device).device, generator)
        inner, outer, last = (
            torch.randint(2, (size,), dtype=torch.int8, device=device, generator=generator).mul_(2).sub_(1)
            for size in (n, dim, rank)
        )
        columns = torch.randperm(n, device=device, generator=generator)[:rank].clone()
        return cls(inner, outer, columns, last.to(dtype).diag())

    # ---- products ---------------------------------------------------------------------------------------------------

    def lift(self, coordinates: Tensor, origin: Tensor | None = None) -> Tensor:
        """Return ``Z P'``, plus ``origin`` ``(D,)`` if given, shape ``(S, D)``, for Z of shape ``(S, r)``."""
        weights = coordinates @ self.mix.to(coordinates.dtype).mT
        sparse = torch.zeros((len(weights), len(self.inner_signs)), dtype=weights.dtype, device=weights.device)
        spread = hadamard_transform(sparse.index_add(-1, self.columns, weights)) * self.inner_signs
        kept = hadamard_transform(spread)[:, : len(self.outer_signs)]
        offsets = kept * self.outer_signs / math.sqrt(len(self.inner_signs))
        return offsets if origin is None else origin + offsets

    def inner_products(self, rows: Tensor) -> Tensor:
        """Return ``P' X`` in float64, shape ``(r, S)``, for ``rows`` X' of shape ``(S, D)``."""
        n = len(self.inner_signs)
        padded = torch.nn.functional.pad(rows.double() * self.outer_signs, (0, n - rows.shape[-1]))
        spread = hadamard_transform(padded) * self.inner_signs
        found = hadamard_transform(spread)[:, self.columns] / math.sqrt(n)
        return self.mix.double().mT @ found.mT

    def gram(self) -> Tensor:
        """Return ``P' P``, shape ``(r, r)``, float64.

        Before it is mixed, entry (i, j) of P is s_i f(i xor c_j) for one vector f, the transform of u: one transform
        serves all columns. Cost: O(D (log D + k²)) time, 8 n bytes.
        """
        n, count = len(self.inner_signs), len(self.columns)
        f = hadamard_transform(self.inner_signs.double()).div_(math.sqrt(n))
        total = torch.zeros((count, count), dtype=torch.float64, device=self.device)
        dim, width = len(self.outer_signs), max(GATHERED // count, 1)
        for start in range(0, dim, width):
            places = torch.arange(start, min(start + width, dim), device=f.device)
            rows = f[places ^ self.columns[:, None]]
            total += rows @ rows.mT
        return self.mix.mT.double() @ total @ self.mix.double()

    def mixed(self, mix: Tensor) -> Self:
        """Return ``P A`` for A of shape ``(r, m)``, by a change of the mix alone."""
        product = self.mix.double() @ mix.double()
        return self.__class__(self.inner_signs, self.outer_signs, self.columns, product.to(self.mix.dtype))

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return ``P X``, shape ``(D, S)`` or ``(D,)``, for X of shape ``(r, S)`` or ``(r,)``; differentiable."""
        if isinstance(other, LinearOperator):
            return super().matmul(other)
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[-1]:
            raise ShapeError(f"expected ({self.shape[-1]}, S) or ({self.shape[-1]},); got {tuple(other.shape)}.")
        return self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.lift(rhs[None])[0] if rhs.ndim == 1 else self.lift(rhs.mT).mT

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        products = self.inner_products(rhs[None])[:, 0] if rhs.ndim == 1 else self.inner_products(rhs.mT)
        return products.to(rhs.dtype)

    def _size(self) -> torch.Size:
        return torch.Size((len(self.outer_signs), self.mix.shape[-1]))

    def _transpose_nonbatch(self) -> "_TransposedHadamard":
        return _TransposedHadamard(self)

    # ---- copies and files -------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """That of the mix."""
        return self.mix.dtype

    @property
    def device(self) -> torch.device:
        """Where signs and mix lie."""
        return self.mix.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the operator on another device or in another dtype, as ``torch.Tensor.to``."""
        mix = self.mix.to(*args, **kwargs)
        inner, outer, columns = (t.to(mix.device) for t in (self.inner_signs, self.outer_signs, self.columns))
        return self.__class__(inner, outer, columns, mix)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.to_state().values())

    def to_state(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        names = ("inner_signs", "outer_signs", "columns", "mix")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the operator of :meth:`to_state`.

        Raises:
            ShapeError: If a tensor is missing, or as the constructor does.
        """
        names = ("inner_signs", "outer_signs", "columns", "mix")
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ShapeError(f"a structured basis needs {', '.join(names)}; missing {', '.join(missing)}.")
        return cls(tensors["inner_signs"], tensors["outer_signs"], tensors["columns"], tensors["mix"])


class _TransposedHadamard(UnbatchedLinearOperator):
    """The transpose of a :class:`RandomizedHadamardLinearOperator`."""

    def __init__(self, operator: RandomizedHadamardLinearOperator) -> None:
        super().__init__(operator)
        self.operator = operator

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        if isinstance(other, LinearOperator):
            return super().matmul(other)
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[-1]:
            raise ShapeError(f"expected ({self.shape[-1]}, S) or ({self.shape[-1]},); got {tuple(other.shape)}.")
        return self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.operator._t_matmul(rhs)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return self.operator._matmul(rhs)

    def _size(self) -> torch.Size:
        return torch.Size(reversed(self.operator._size()))

    def _transpose_nonbatch(self) -> RandomizedHadamardLinearOperator:
        return self.operator


torch.serialization.add_safe_globals([RandomizedHadamardLinearOperator])
