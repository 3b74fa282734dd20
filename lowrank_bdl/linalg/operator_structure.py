"""Operations that keep a low-rank-plus-diagonal matrix what it is: scaling, sums, blocks, batch axes, dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    LowRankRootAddedDiagLinearOperator,
    RootLinearOperator,
    ZeroLinearOperator,
)
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import in_dtype, sums_device, to_float64
from lowrank_bdl.linalg.indices import Index, all_distinct, positions, same_index
from lowrank_bdl.linalg.operator_state import LowRankPlusDiagState
from lowrank_bdl.linalg.structured import LinearOperatorBlock, ScaledLinearOperator


class LowRankPlusDiagStructure(LowRankPlusDiagState):
    """What returns an operator of the same class, never a second D x K tensor but where that is the result."""

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        _ = self.factors
        constant = torch.as_tensor(other, device=sums_device(self.device))
        if bool((constant == 0).all()):
            return ZeroLinearOperator(*self.shape, dtype=self.dtype, device=self.device)
        if not bool((constant > 0).all()):
            return ScaledLinearOperator(self, in_dtype(constant, self.dtype, self.device))
        root = to_float64(constant).sqrt()
        mix = self.mix
        if constant.ndim:
            eye = torch.eye(self.root.shape[-1], dtype=torch.float64, device=self.mix.device)
            mix = mix.double() * eye if mix.ndim == 0 else mix
            root = root[..., None, None]
        diag = self.diag * in_dtype(constant[..., None] if constant.ndim else constant, self.dtype, self.device)
        return self._derived(self.root, diag, mix * root, self.root_scale)

    def add_diagonal(self, diag: Tensor) -> Self:
        """Return Sigma + diag(``diag``), with ``diag`` of shape ``(*B, D)``, ``(*B, 1)`` or ``()``."""
        if diag.ndim and diag.shape[-1] not in (1, self.shape[-1]):
            raise ShapeError(f"diag must end in 1 or {self.shape[-1]} entries; got shape {tuple(diag.shape)}.")
        return self._derived(self.root, self.diag + diag, self.mix, self.root_scale)

    def __add__(self, other: Any) -> LinearOperator:
        _ = self.factors
        if isinstance(other, ZeroLinearOperator) or (isinstance(other, int | float) and other == 0):
            return self
        if isinstance(other, DiagLinearOperator):
            return self.add_diagonal(other._diagonal())
        if isinstance(other, LowRankRootAddedDiagLinearOperator):
            other = self.from_linear_operator(other)
        elif isinstance(other, RootLinearOperator):
            root = other.root.to_dense()
            other = self.__class__(root, torch.zeros_like(root[..., 0], dtype=self.dtype))
        elif isinstance(other, ScaledLinearOperator):
            return self._minus_multiple(other) or super().__add__(other)
        else:
            return super().__add__(other)
        return self._stacked((self, other))

    def _minus_multiple(self, other: ScaledLinearOperator) -> Self | None:
        """Return the difference to a smaller multiple of a matrix with the same root, None if ``other`` is no such."""
        base = other.base
        if (
            not isinstance(base, LowRankPlusDiagStructure)
            or other.constant.ndim
            or base.root_scale is not self.root_scale
        ):
            return None
        same = base.root.data_ptr() == self.root.data_ptr() and base.root.stride() == self.root.stride()
        if not same or base.root.shape != self.root.shape or base.root.dtype != self.root.dtype:
            return None
        if self.mix.ndim or base.mix.ndim:
            return None
        square = self.mix.double().square() + other.constant.double() * base.mix.double().square()
        if not bool(square >= 0):
            return None
        diag = self.diag + other.constant.to(base.dtype) * base.diag
        return self._derived(self.root, diag, square.sqrt(), self.root_scale) if bool((diag >= 0).all()) else None

    def add_low_rank(self, low_rank_mat: Tensor | LinearOperator, *args: Any, **kwargs: Any) -> LinearOperator:
        """Return Sigma + V V' for V of shape ``(*B, D, L)``, with the columns of V stacked beside the root."""
        dense = low_rank_mat if isinstance(low_rank_mat, Tensor) else low_rank_mat.to_dense()
        return self + RootLinearOperator(dense)

    def _stacked(self, terms: tuple[Self, ...]) -> Self:
        """Return the sum of several operators: their roots stacked, a result of that size, and their mixes."""
        if any(term.shape[-1] != self.shape[-1] for term in terms):
            raise ShapeError(f"sizes must agree; got {[tuple(term.shape) for term in terms]}.")
        terms = tuple(term._decoded() for term in terms)
        batch = torch.broadcast_shapes(*(term.batch_shape for term in terms))
        dtypes = {term.root.dtype for term in terms}
        widest = torch.float64 if any(term.dtype is torch.float64 for term in terms) else torch.float32
        dtype = widest if len(dtypes) > 1 else dtypes.pop()
        rows = [term.factors.root.mT.to(dtype).expand(*batch, -1, -1) for term in terms]
        if all(term.mix.ndim == 0 for term in terms) and len({id(term.mix) for term in terms}) == 1:
            mix = terms[0].mix
        else:
            mix = block_diagonal([term._mix_matrix() for term in terms])
        return self.__class__(torch.cat(rows, dim=-2).mT, sum(term.diag for term in terms), mix)  # type: ignore[arg-type]

    def _mix_matrix(self) -> Tensor:
        if self.mix.ndim:
            return self.mix.double()
        return self.mix.double() * torch.eye(self.root.shape[-1], dtype=torch.float64, device=self.mix.device)

    def _sum_batch(self, dim: int) -> LinearOperator:
        terms = self._map(lambda t: t.movedim(dim, 0))
        return self._stacked(tuple(terms[i] for i in range(terms.shape[0])))

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a change of batch axes to every tensor that has them."""
        mix = change(self.mix) if self.mix.ndim > 2 else self.mix
        scale = None if self.root_scale is None else change(self.root_scale)
        return self._derived(change(self.root), change(self.diag), mix, scale)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> Self:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        core, own = self._core, len(self._core.batch_shape)
        result = core._derived(
            core.root.expand(*shape, *core.root.shape[-2:]),
            core.diag.expand(*shape, core.shape[-1]),
            core.mix,
            None if core.root_scale is None else core.root_scale.expand(*shape, *core.root_scale.shape[-2:]),
        )
        if shape[len(shape) - own :] == core.batch_shape:
            result._unexpanded = core
        return result

    def _permute_batch(self, *dims: int) -> Self:
        return self._map(lambda t: t.permute(*dims, *range(len(dims), t.ndim)))

    def _unsqueeze_batch(self, dim: int) -> Self:
        return self._map(lambda t: t.unsqueeze(dim))

    def squeeze(self, dim: int) -> Self:
        """Return the operator without the batch axis ``dim`` of size one."""
        axis = dim if dim >= 0 else dim + self.ndim
        if axis >= len(self.batch_shape) or self.batch_shape[axis] != 1:
            return self
        return self._map(lambda t: t.squeeze(axis))

    def __getitem__(self, index: Any) -> Any:
        _ = self.factors
        return super().__getitem__(index)

    def _batch_entries(self, index: tuple[Index | int, ...]) -> Self:
        return self._map(lambda tensor: tensor[index])

    def select(self, rows: Index, columns: Index) -> LinearOperator:
        """Return the block of these rows and columns: of this class where they agree, else a rectangular operator.

        Args:
            rows: A slice or a LongTensor ``(m,)`` of coordinates.
            columns: Likewise ``(n,)``.

        Cost: a view for slices, a gather of the chosen rows of the root for tensors.
        """
        size = self.shape[-1]
        same = isinstance(rows, slice) and isinstance(columns, slice) and same_index(rows, columns, size)
        if not same:
            rows, columns = positions(rows, size, self.device), positions(columns, size, self.device)
            if not same_index(rows, columns, size) or not all_distinct(rows, size):
                _ = self.factors
                return LinearOperatorBlock(self, rows, columns)
        diag = self.diag[..., rows]
        if self.root_scale is not None:
            gathered = self.factors.rows_at(positions(rows, size, self.device), self.dtype)
            return self._derived(gathered.mT, diag, self.mix, None)
        factors = self.factors
        chosen = factors.root.mT[..., rows] if isinstance(rows, slice) else factors.gathered(rows)
        return self._derived(chosen.mT, diag, self.mix, None)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        row_index, col_index, *batch = (part.to(self.device) for part in (row_index, col_index, *batch_indices))
        batch_indices = tuple(batch)
        root = self._decoded().factors.root
        left_index, right_index = (*batch_indices, row_index), (*batch_indices, col_index)
        left, right = root[left_index], root[right_index]
        mix = in_dtype(self._mix_matrix(), self.dtype, self.device)
        mix = mix[batch_indices] if batch_indices and mix.ndim > 2 else mix
        left, right = ((side.to(self.dtype).unsqueeze(-2) @ mix).squeeze(-2) for side in (left, right))
        on_diagonal = torch.where(row_index == col_index, self.diag[left_index], 0.0)
        return (left * right).sum(-1) + on_diagonal

    # ---- dtype and device -------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device and compute in a dtype, as `torch.Tensor.to`.

        A wider dtype applies to the diagonal and so to all arithmetic, and leaves the root as it is stored; a narrower
        one applies to the root as well. float16 and bfloat16 are refused.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        diag = self.diag.to(device=device, dtype=dtype)
        narrower = dtype is not None and self.root.dtype.itemsize > dtype.itemsize
        root = self.root.to(device=device, dtype=dtype if narrower else None)
        scale = None if self.root_scale is None else self.root_scale.to(device=device)
        return self._derived(root, diag, self.mix.to(device=None if device is None else sums_device(device)), scale)

    def type(self, dtype: torch.dtype) -> Self:
        """Compute in another dtype; see `to`."""
        return self.to(dtype)

    def cpu(self) -> Self:
        """Move to the CPU."""
        return self.to("cpu")

    def cuda(self, device_id: Any = None) -> Self:
        """Move to a CUDA device."""
        return self.to(torch.device("cuda", device_id) if isinstance(device_id, int) else device_id or "cuda")

    def detach(self) -> Self:
        """Return the operator without its autograd history; the factorisation is kept."""
        if self._unexpanded is not None:
            return self._unexpanded.detach()._expand_batch(self.batch_shape)
        scale = None if self.root_scale is None else self.root_scale.detach()
        result = self._derived(self.root.detach(), self.diag.detach(), self.mix.detach(), scale)
        result._factored = self._factored
        return result

    def clone(self) -> Self:
        """Return a copy that owns its tensors and is not pinned; the K x D layout of the root is kept."""
        factors = self.factors
        scale = None if factors.scale is None else factors.scale.clone()
        root = factors.root.mT.contiguous().clone() if factors.root.mT.is_contiguous() else factors.root.mT.contiguous()
        return self.__class__(root.mT, factors.diag.clone(), factors.mix.clone(), root_scale=scale)


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    """Return the block-diagonal matrix of ``(*B, K, R)`` blocks, with batch axes."""
    batch = torch.broadcast_shapes(*(block.shape[:-2] for block in blocks))
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (-2, -1))
    result = blocks[0].new_zeros((*batch, rows, columns))
    row = column = 0
    for block in blocks:
        result[..., row : row + block.shape[-2], column : column + block.shape[-1]] = block
        row, column = row + block.shape[-2], column + block.shape[-1]
    return result
