"""Right-hand sides with batch axes that the matrix does not have."""

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError


class Fold:
    """Right-hand sides as columns of one core matrix: axes that the core lacks, or has with size one, become columns.

    A kernel then reads the root once for all of them, where repeating the matrix would read it once for each.

    Args:
        rhs: Shape ``(*E, *B, D, S)``, broadcast against the batch of the operator, or ``(D,)``.
        batch: Batch shape of the operator, after `expand`.
        core: Batch shape of the matrix that is kept in memory; the trailing axes of ``batch``.
        dim: D.

    Attributes:
        columns: Shape ``(*core, D, C)`` with C the product of S and the folded axes; a view where strides allow it.
        vector: Whether ``rhs`` was one-dimensional.

    Raises:
        ShapeError: If ``rhs`` does not have D rows or its batch axes do not broadcast.
    """

    def __init__(self, rhs: Tensor, batch: torch.Size, core: torch.Size, dim: int) -> None:
        self.vector = rhs.ndim == 1
        if self.vector:
            rhs = rhs.unsqueeze(-1)
        if rhs.ndim < 2 or rhs.shape[-2] != dim:
            raise ShapeError(f"the right-hand side must have {dim} rows (..., {dim}, S); got {tuple(rhs.shape)}.")
        try:
            self._full = torch.broadcast_shapes(batch, rhs.shape[:-2])
            shape = torch.broadcast_shapes(core, rhs.shape[:-2])
        except RuntimeError:
            raise ShapeError(
                f"batch axes of the right-hand side {tuple(rhs.shape)} do not broadcast with {tuple(batch)}."
            ) from None
        rhs = rhs.expand(*shape, *rhs.shape[-2:])
        ones = (1,) * (len(shape) - len(core))
        folded = [axis for axis, size in enumerate((*ones, *core)) if size == 1]
        kept = [axis for axis in range(len(shape)) if axis not in folded]
        self._core = core
        self._sizes = (*(shape[axis] for axis in folded), rhs.shape[-1])
        self._order = (*kept, len(shape), *folded, len(shape) + 1)
        columns = rhs.permute(self._order).flatten(len(kept) + 1)
        self.columns = columns.reshape(*core, *columns.shape[-2:])

    def undo(self, result: Tensor) -> Tensor:
        """Return ``result`` of shape ``(*core, N, C)`` as ``(*E, *B, N, S)``, or without S for a vector."""
        kept = [size for size in self._core if size != 1]
        result = result.reshape(*kept, result.shape[-2], *self._sizes)
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        result = result.permute(inverse).expand(*self._full, result.shape[len(kept)], self._sizes[-1])
        return result.squeeze(-1) if self.vector else result
