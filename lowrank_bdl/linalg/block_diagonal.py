"""Block-diagonal matrices whose blocks differ in size and structure, such as one block a layer of a network."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator, ZeroLinearOperator
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import sums_device, to_float64
from lowrank_bdl.linalg.exact import DENSE_LIMIT_GIB, check_dense_size
from lowrank_bdl.linalg.indices import Index, positions, same_index
from lowrank_bdl.linalg.squared import SquaredLinearOperator
from lowrank_bdl.linalg.structured import LinearOperatorBlock, StructuredLinearOperator


class BlockDiagonalLinearOperator(StructuredLinearOperator):
    r"""The matrix :math:`\mathrm{diag}(\Sigma_1, \dots, \Sigma_B)` of square blocks, each an operator of its own kind.

    Every operation is the blocks' own, on their coordinates: exact where theirs is, and never dense. (The
    ``BlockDiagLinearOperator`` of linear_operator takes a batch of equal sizes and one structure.)

    Args:
        blocks: Square operators :math:`\Sigma_b`, ``(*B, d_b, d_b)``, of one dtype, device and batch shape.

    Attributes:
        blocks: As given.
        slices: The coordinates of each.

    Raises:
        ShapeError: If there is no block, one is not square, or batch shapes differ.
        TypeError: If a block is no LinearOperator, or dtypes differ.

    Cost: the sum over the blocks.

    Example:
        >>> from linear_operator.operators import DenseLinearOperator, DiagLinearOperator
        >>> small, large = torch.tensor([2.0]), torch.tensor([[3.0, 1.0], [1.0, 3.0]])
        >>> sigma = BlockDiagonalLinearOperator(DiagLinearOperator(small), DenseLinearOperator(large))
        >>> sigma @ torch.ones(3)
        tensor([2., 4., 4.])
        >>> round(sigma.logdet().item(), 4)  # log(2 * 8)
        2.7726
    """

    def __init__(self, *blocks: LinearOperator) -> None:
        if not blocks:
            raise ShapeError("a block-diagonal matrix needs at least 1 block; got none.")
        for number, block in enumerate(blocks):
            if not isinstance(block, LinearOperator):
                raise TypeError(f"blocks must be LinearOperators; block {number} is a {type(block).__name__}.")
            if block.shape[-1] != block.shape[-2] or block.batch_shape != blocks[0].batch_shape:
                raise ShapeError(
                    "blocks must be square and of one batch shape; "
                    f"block {number} is {tuple(block.shape)}, block 0 is {tuple(blocks[0].shape)}."
                )
            if block.dtype != blocks[0].dtype or block.device != blocks[0].device:
                raise TypeError(
                    f"blocks must have one dtype and device; block {number} is {block.dtype} on {block.device}, "
                    f"block 0 is {blocks[0].dtype} on {blocks[0].device}."
                )
        super().__init__(*blocks)
        self.blocks = blocks
        ends = list(accumulate(block.shape[-1] for block in blocks))
        self.slices = tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.blocks

    def _size(self) -> torch.Size:
        dim = self.slices[-1].stop
        return torch.Size((*self.blocks[0].batch_shape, dim, dim))

    def _map(self, change: Callable[[LinearOperator], LinearOperator]) -> "BlockDiagonalLinearOperator":
        return BlockDiagonalLinearOperator(*(change(block) for block in self.blocks))

    def _transpose_nonbatch(self) -> "BlockDiagonalLinearOperator":
        return self._map(lambda block: block._transpose_nonbatch())

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> "BlockDiagonalLinearOperator":
        return self._map(lambda block: block._expand_batch(batch_shape))

    def _unsqueeze_batch(self, dim: int) -> "BlockDiagonalLinearOperator":
        return self._map(lambda block: block._unsqueeze_batch(dim))

    def _permute_batch(self, *dims: int) -> "BlockDiagonalLinearOperator":
        return self._map(lambda block: block._permute_batch(*dims))

    def _batch_entries(self, index: tuple[Index | int, ...]) -> "BlockDiagonalLinearOperator":
        whole = (*index, slice(None), slice(None))
        return self._map(lambda block: block[whole])

    # ---- products and solves ----------------------------------------------------------------------------------------

    def _over_rows(self, rhs: Tensor, apply: Callable[[LinearOperator, Tensor], Tensor]) -> Tensor:
        """Apply a map of each block to its rows of ``rhs``, ``(*B, D, S)`` or ``(D,)``."""
        vector = rhs.ndim == 1
        columns = rhs.unsqueeze(-1) if vector else rhs
        if columns.shape[-2] != self.shape[-1]:
            raise ShapeError(f"the right-hand side must have {self.shape[-1]} rows; got {tuple(rhs.shape)}.")
        pieces = [apply(block, columns[..., part, :]) for block, part in zip(self.blocks, self.slices, strict=True)]
        result = torch.cat(pieces, dim=-2)
        return result.squeeze(-1) if vector else result

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``, shape ``(*B, D, S)`` or ``(D,)``."""
        if isinstance(other, LinearOperator):
            return super().matmul(other)
        return self._over_rows(other, lambda block, rows: block.matmul(rows))

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._over_rows(rhs, lambda block, rows: block._matmul(rows))

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return self._over_rows(rhs, lambda block, rows: block._t_matmul(rows))

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return ``Sigma^-1 right``, or ``left Sigma^-1 right``; shapes ``(*B, D, S)`` or ``(D,)``, and ``(*B, O, D)``.

        Raises:
            NotPSDError: If a block has no inverse.
        """
        result = self._over_rows(right_tensor, lambda block, rows: block.solve(rows))
        return result if left_tensor is None else left_tensor @ result

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\mathrm{tr}(X^\top \Sigma^{-1} X)` and :math:`\log|\Sigma|`, summed over blocks in float64.

        Args:
            inv_quad_rhs: :math:`X`, shape ``(*B, D, S)`` or ``(D,)``.
            logdet: Whether to compute the log-determinant.
            reduce_inv_quad: Whether to sum over the S columns.

        Returns:
            Float64 tensors of shape ``(*B,)`` (or ``(*B, S)`` unreduced) and ``(*B,)``; zeros for what was not asked
            for.
        """
        quadratic = log_determinant = torch.zeros((), dtype=torch.float64, device=sums_device(self.device))
        vector = inv_quad_rhs is not None and inv_quad_rhs.ndim == 1
        columns = inv_quad_rhs.unsqueeze(-1) if vector and inv_quad_rhs is not None else inv_quad_rhs
        if columns is not None and columns.shape[-2] != self.shape[-1]:
            raise ShapeError(f"the right-hand side must have {self.shape[-1]} rows; got {tuple(columns.shape)}.")
        for block, part in zip(self.blocks, self.slices, strict=True):
            rows = None if columns is None else columns[..., part, :]
            own, own_log = block.inv_quad_logdet(rows, logdet=logdet, reduce_inv_quad=reduce_inv_quad)
            if rows is not None:
                quadratic = quadratic + to_float64(own)
            if logdet:
                log_determinant = log_determinant + to_float64(own_log)
        if vector and not reduce_inv_quad and columns is not None:
            quadratic = quadratic.squeeze(-1)
        return quadratic, log_determinant

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        r"""Return :math:`\mathrm{tr}(X^\top \Sigma^{-1} X)`, as `inv_quad_logdet` does."""
        return self.inv_quad_logdet(inv_quad_rhs, reduce_inv_quad=reduce_inv_quad)[0]

    def logdet(self) -> Tensor:
        r"""Return :math:`\log|\Sigma|`, shape ``(*B,)``, float64 [nat]; the blocks leave their point masses out."""
        return self.inv_quad_logdet(logdet=True)[1]

    def _logdet(self) -> Tensor:
        return self.logdet()

    def _diagonal(self) -> Tensor:
        return torch.cat([block._diagonal() for block in self.blocks], dim=-1)

    # ---- sums and multiples -----------------------------------------------------------------------------------------

    def add_diagonal(self, diag: Tensor) -> "BlockDiagonalLinearOperator":
        """Return Sigma + diag(``diag``), with ``diag`` of shape ``(*B, D)``, ``(*B, 1)`` or ``()``."""
        if diag.ndim == 0 or diag.shape[-1] == 1:
            return self._map(lambda block: block.add_diagonal(diag))
        if diag.shape[-1] != self.shape[-1]:
            raise ShapeError(f"diag must end in 1 or {self.shape[-1]} entries; got shape {tuple(diag.shape)}.")
        pairs = zip(self.blocks, self.slices, strict=True)
        return BlockDiagonalLinearOperator(*(block.add_diagonal(diag[..., part]) for block, part in pairs))

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        if bool((torch.as_tensor(other) == 0).all()):
            return ZeroLinearOperator(*self.shape, dtype=self.dtype, device=self.device)
        return self._map(lambda block: block._mul_constant(other))

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, BlockDiagonalLinearOperator) and other.slices == self.slices:
            pairs = zip(self.blocks, other.blocks, strict=True)
            return BlockDiagonalLinearOperator(*(mine + theirs for mine, theirs in pairs))
        return super().__add__(other)

    def inverse(self) -> "BlockDiagonalLinearOperator":
        """Return the inverse of every block, where each has one as an operator."""
        return self._map(lambda block: block.inverse())

    # ---- draws and roots --------------------------------------------------------------------------------------------

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Return draws from N(0, Sigma), shape ``(num_samples, *B, D)``: each block's own, independent."""
        return torch.cat([block.zero_mean_mvn_samples(num_samples) for block in self.blocks], dim=-1)

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """Return a root as an operator, of each block its own; ``method`` is passed on."""
        return SquaredLinearOperator(self._roots(lambda block: block.root_decomposition(method)))

    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> RootLinearOperator:
        """Return a root of the inverse as an operator, of each block its own; vectors are not needed."""
        return SquaredLinearOperator(self._roots(lambda block: block.root_inv_decomposition(method=method)))

    def _roots(self, root: Callable[[LinearOperator], LinearOperator]) -> "BlockDiagonalLinearOperator":
        roots: Sequence[LinearOperator] = [root(block).root for block in self.blocks]
        for number, (block, found) in enumerate(zip(self.blocks, roots, strict=True)):
            if found.shape[-1] != block.shape[-1]:
                raise NotImplementedError(f"block {number} has a root of shape {tuple(found.shape)}, not a square one.")
        return BlockDiagonalLinearOperator(*roots)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def select(self, rows: Index, columns: Index) -> LinearOperator:
        """Return the block of these rows and columns: of this class for one run of coordinates, else rectangular.

        Args:
            rows: A slice or a LongTensor ``(m,)`` of coordinates.
            columns: Likewise ``(n,)``.
        """
        size = self.shape[-1]
        if not isinstance(rows, slice) or not isinstance(columns, slice) or not same_index(rows, columns, size):
            return LinearOperatorBlock(self, positions(rows, size, self.device), positions(columns, size, self.device))
        kept = range(size)[rows]
        if kept == range(size):
            return self
        if kept.step != 1 or not kept:
            index = positions(rows, size, self.device)
            return LinearOperatorBlock(self, index, index)
        parts = []
        for block, place in zip(self.blocks, self.slices, strict=True):
            low, high = max(kept.start, place.start) - place.start, min(kept.stop, place.stop) - place.start
            if low < high:
                cut = slice(low, high)
                parts.append(block if high - low == block.shape[-1] else block[..., cut, cut])
        return BlockDiagonalLinearOperator(*parts)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        rows, columns, *batch = torch.broadcast_tensors(
            *(index.to(self.device) for index in (row_index, col_index, *batch_indices))
        )
        result = torch.zeros(rows.shape, dtype=self.dtype, device=self.device)
        for block, part in zip(self.blocks, self.slices, strict=True):
            inside = (rows >= part.start) & (rows < part.stop) & (columns >= part.start) & (columns < part.stop)
            if bool(inside.any()):
                own = (rows[inside] - part.start, columns[inside] - part.start, *(index[inside] for index in batch))
                result = result.masked_scatter(inside, block._get_indices(*own))
        return result

    def to(self, *args: Any, **kwargs: Any) -> "BlockDiagonalLinearOperator":
        """Move to a device and compute in a dtype, as `torch.Tensor.to`."""
        return self._map(lambda block: block.to(*args, **kwargs))

    def type(self, dtype: torch.dtype) -> "BlockDiagonalLinearOperator":
        """Compute in another dtype; see `to`."""
        return self._map(lambda block: block.to(dtype=dtype))

    # ---- dense ------------------------------------------------------------------------------------------------------

    def to_dense(self, limit_gib: float = DENSE_LIMIT_GIB) -> Tensor:
        """Return the matrix as a dense tensor ``(*B, D, D)``.

        Args:
            limit_gib: The largest result allowed [GiB].

        Raises:
            MemoryLimitError: If the result would be larger than ``limit_gib``.
        """
        check_dense_size(self, limit_gib)
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        pieces = [block.to_dense() for block in self.blocks]
        if not any(piece.requires_grad for piece in pieces):
            for piece, part in zip(pieces, self.slices, strict=True):
                result[..., part, part] = piece
            return result
        rows = [
            torch.cat((result[..., part, : part.start], piece, result[..., part, part.stop :]), dim=-1)
            for piece, part in zip(pieces, self.slices, strict=True)
        ]
        return torch.cat(rows, dim=-2)


torch.serialization.add_safe_globals([BlockDiagonalLinearOperator])
