"""Indices of rows, columns and batch axes, as the structured operators read them."""

from typing import Any, TypeAlias

import torch
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
        IndexError: If a coordinate is no integer or out of range, or a mask has another length.
    """
    if isinstance(index, slice):
        return torch.arange(size, device=device)[index]
    index = index.to(device)
    if index.is_floating_point() or index.is_complex():
        raise IndexError(f"coordinates must be integers or a mask; got {index.dtype}.")
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


def plain_index(index: Any, shape: torch.Size, device: torch.device) -> tuple[Any, ...]:
    """Return ``index`` as one entry an axis: integers made positive, masks and lists as LongTensors on ``device``.

    `LinearOperator.__getitem__` refuses masks and takes ``-1`` for an empty slice.

    Raises:
        IndexError: If there are too many indices, one is None, or an integer is out of range.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    places = [i for i, part in enumerate(parts) if part is Ellipsis]
    fill = [slice(None)] * (len(shape) - len(parts) + len(places[:1]))
    if len(places) > 1 or len(parts) - len(places) > len(shape):
        raise IndexError(f"too many indices for shape {tuple(shape)}: {index}.")
    parts = parts[: places[0]] + fill + parts[places[0] + 1 :] if places else parts + fill
    for axis, (part, size) in enumerate(zip(parts, shape, strict=True)):
        if part is None:
            raise IndexError(f"None adds no axis to shape {tuple(shape)}; use unsqueeze().")
        if not isinstance(part, slice | int | Tensor):  # a list, a range, an array or number of NumPy
            part = torch.as_tensor(part)
            part = part if part.numel() else part.long()
        if isinstance(part, Tensor):
            part = positions(part, size, device) if part.ndim else int(part)
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
