"""Rectangular blocks of a low-rank-plus-diagonal or block-diagonal matrix."""

from typing import Any, TypeAlias

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

Index: TypeAlias = slice | Tensor


def same_index(left: Index, right: Index, size: int) -> bool:
    """Whether two indices choose the same coordinates of ``size`` in the same order."""
    if isinstance(left, slice) and isinstance(right, slice):
        return range(size)[left] == range(size)[right]
    if isinstance(left, slice) or isinstance(right, slice):
        return False
    return left is right or torch.equal(left, right)


def positions(index: Index, size: int, device: torch.device) -> Tensor:
    """Return ``index`` as a LongTensor of coordinates from 0 to ``size`` - 1.

    Raises:
        IndexError: If a coordinate is out of range, or a mask has another length.
    """
    if isinstance(index, slice):
        return torch.arange(size, device=device)[index]
    index = index.to(device)
    if index.dtype is torch.bool:
        if index.shape != (size,):
            raise IndexError(f"a mask of coordinates must have shape ({size},); got {tuple(index.shape)}.")
        return index.nonzero().squeeze(-1)
    if not index.numel():
        return index.long()
    smallest, largest = (int(value) for value in torch.aminmax(index))
    if not (-size <= smallest and largest < size):
        raise IndexError(f"coordinates must be in [-{size}, {size}); got {smallest} to {largest}.")
    return (torch.where(index < 0, index + size, index) if smallest < 0 else index).long()


def plain_index(index: Any, shape: torch.Size) -> tuple[Any, ...]:
    """Return ``index`` as one entry an axis, masks and lists as LongTensors and negative integers made positive.

    `LinearOperator.__getitem__` refuses masks and takes ``-1`` for an empty slice.

    Raises:
        IndexError: If there are too many indices or an integer is out of range.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    places = [i for i, part in enumerate(parts) if part is Ellipsis]
    fill = [slice(None)] * (len(shape) - len(parts) + len(places[:1]))
    if len(places) > 1 or len(parts) - len(places) > len(shape):
        raise IndexError(f"too many indices for shape {tuple(shape)}: {index}.")
    parts = parts[: places[0]] + fill + parts[places[0] + 1 :] if places else parts + fill
    for axis, (part, size) in enumerate(zip(parts, shape, strict=True)):
        if isinstance(part, list):
            part = torch.tensor(part, dtype=torch.long if not part else None)
        if isinstance(part, Tensor):
            part = positions(part, size, part.device)
        if isinstance(part, int):
            if not -size <= part < size:
                raise IndexError(f"index {part} is out of range for axis {axis} of shape {tuple(shape)}.")
            part = part % size
        parts[axis] = part
    return tuple(parts)


def all_distinct(index: Tensor, size: int) -> bool:
    """Whether no coordinate of ``size`` occurs twice in ``index``; marks them in one byte each instead of sorting."""
    seen = torch.zeros(size, dtype=torch.bool, device=index.device)
    seen[index] = True
    return int(seen.count_nonzero()) == len(index)


class LowRankPlusDiagBlock(LinearOperator):
    r"""The block ``Sigma[rows, columns]``: what ``Sigma[rows]`` is until ``[:, columns]`` makes it square again.

    Args:
        base: The matrix Sigma, shape ``(*B, D, D)``: an operator with a ``select`` that gives such blocks.
        rows: Coordinates of the rows, ``(m,)``.
        columns: Coordinates of the columns, ``(n,)``.
    """

    def __init__(self, base: LinearOperator, rows: Tensor, columns: Tensor) -> None:
        super().__init__(base, rows=rows, columns=columns)
        self.base = base
        self.rows = rows
        self.columns = columns

    def _size(self) -> torch.Size:
        return torch.Size((*self.base.batch_shape, len(self.rows), len(self.columns)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the whole matrix."""
        dtype: torch.dtype = self.base.dtype
        return dtype

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(plain_index(index, self.shape))

    def _transpose_nonbatch(self) -> "LowRankPlusDiagBlock":
        return LowRankPlusDiagBlock(self.base, self.columns, self.rows)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> "LowRankPlusDiagBlock":
        return LowRankPlusDiagBlock(self.base._expand_batch(batch_shape), self.rows, self.columns)

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with ``other``, directly: linear_operator's way would rebuild and refactorise the base."""
        return super().matmul(other) if isinstance(other, LinearOperator) else self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        """Return the product with ``rhs`` of shape ``(*B, n, S)``: embed in D coordinates, multiply, select."""
        vector = rhs.ndim == 1
        columns = rhs.unsqueeze(-1) if vector else rhs
        shape = (*columns.shape[:-2], self.base.shape[-1], columns.shape[-1])
        embedded = columns.new_zeros(shape).index_add(-2, self.columns, columns)
        result: Tensor = self.base.matmul(embedded)[..., self.rows, :]
        return result.squeeze(-1) if vector else result

    def _getitem(self, row_index: Index, col_index: Index, *batch_indices: Index | int) -> LinearOperator:
        base = self.base[batch_indices] if batch_indices else self.base
        return base.select(self.rows[row_index], self.columns[col_index])

    def to_dense(self) -> Tensor:
        """Return the block as a dense tensor ``(*B, m, n)``."""
        if len(self.rows) < len(self.columns):
            return self._transpose_nonbatch().to_dense().mT
        eye = torch.eye(len(self.columns), dtype=self.dtype, device=self.base.device)
        return self._matmul(eye.expand(*self.base.batch_shape, *eye.shape))
