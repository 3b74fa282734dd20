"""State of a low-rank-plus-diagonal operator: its tensors, their versions, and the factorisation kept for them."""

from typing import Any

import torch
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
)
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import ShapeError, StaleError
from lowrank_bdl.linalg.block_scaling import num_blocks
from lowrank_bdl.linalg.capacitance import Capacitance, Projection, factorize
from lowrank_bdl.linalg.devices import in_dtype, sums_device
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.linalg.ridge import Ridge
from lowrank_bdl.linalg.structured import StructuredLinearOperator
from lowrank_bdl.linalg.transforms import transformed


class LowRankPlusDiagState(StructuredLinearOperator, LowRankRootAddedDiagLinearOperator):
    """The tensors of a low-rank-plus-diagonal matrix; see `LowRankPlusDiagLinearOperator` for what they mean."""

    def __init__(
        self, root: Tensor, diag: Tensor, mix: Tensor | float | None = None, root_scale: Tensor | None = None
    ) -> None:
        if not isinstance(root, Tensor) or not isinstance(diag, Tensor):
            raise TypeError(
                f"root and diag must be tensors, got {type(root).__name__} and {type(diag).__name__}; use "
                "from_linear_operator() for the classes of linear_operator."
            )
        if diag.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"diag must be float32 or float64, got {diag.dtype}.")
        if root.ndim < 2 or diag.ndim < 1 or root.shape[-2] != diag.shape[-1]:
            raise ShapeError(
                f"root must be (*B, D, K) and diag (*B, D); got {tuple(root.shape)} and {tuple(diag.shape)}."
            )
        if root.device != diag.device:
            raise ShapeError(f"root and diag must be on one device; got {root.device} and {diag.device}.")
        if mix is None or not isinstance(mix, Tensor):
            mix = torch.tensor(1.0 if mix is None else mix, dtype=torch.float64, device=sums_device(diag.device))
        if mix.ndim and (mix.ndim < 2 or mix.shape[-2] != root.shape[-1]):
            raise ShapeError(f"mix must be a scalar or (*B, {root.shape[-1]}, R); got {tuple(mix.shape)}.")
        blocks = num_blocks(diag.shape[-1])
        if root_scale is not None and root_scale.shape[-2:] != (root.shape[-1], blocks):
            raise ShapeError(f"root_scale must be (*B, {root.shape[-1]}, {blocks}); got {tuple(root_scale.shape)}.")
        if root_scale is not None and root_scale.requires_grad:
            raise ValueError(
                "root_scale must not require a gradient: the scales of a stored root are constants. Multiply a "
                "floating-point root by them where they are to be differentiated by."
            )
        try:
            batch = torch.broadcast_shapes(root.shape[:-2], diag.shape[:-1], mix.shape[:-2])
        except RuntimeError:
            raise ShapeError(
                f"batch shapes must broadcast; got root {tuple(root.shape)}, diag {tuple(diag.shape)} and mix "
                f"{tuple(mix.shape)}."
            ) from None
        root, diag = _expand(root, batch, 2), _expand(diag, batch, 1)
        if mix.ndim > 2:
            mix = _expand(mix, batch, 2)
        if root_scale is not None:
            root_scale = _expand(root_scale, batch, 2)
        # LinearOperator.__init__, not the parent's, which wraps the parts: the representation is plain tensors
        LinearOperator.__init__(self, root, diag, mix, root_scale=root_scale)
        self.root, self.diag, self.mix, self.root_scale = root, diag, mix, root_scale
        self.preconditioner_override = None
        self._factored: tuple[tuple[int, ...], Capacitance] | None = None
        self._pinned: tuple[int, ...] | None = None
        self._unexpanded: Self | None = None
        self._drawable: tuple[int, ...] | None = None

    @classmethod
    def from_linear_operator(cls, operator: LinearOperator) -> Self:
        """Return this class from linear_operator's `LowRankRootAddedDiagLinearOperator`, sharing its tensors."""
        if isinstance(operator, cls):
            return operator
        if not isinstance(operator, LowRankRootAddedDiagLinearOperator):
            raise TypeError(f"expected a LowRankRootAddedDiagLinearOperator, got {type(operator).__name__}.")
        return cls(operator._linear_op.root.to_dense(), operator._diag_tensor._diagonal())

    def _versions(self) -> tuple[int, ...] | None:
        """Return the in-place version of every tensor, or None where torch does not count them (inference mode)."""
        tensors = (self.root, self.diag, self.mix, *(() if self.root_scale is None else (self.root_scale,)))
        return None if any(t.is_inference() for t in tensors) else tuple(t._version for t in tensors)

    def pin(self) -> Self:
        """Declare that the root belongs to somebody else; every use after an in-place change of it raises StaleError.

        Returns:
            The operator itself.
        """
        self._pinned = self._versions()
        return self

    @property
    def factors(self) -> LowRankFactors:
        """The tensors behind this operator, checked to be current.

        Raises:
            StaleError: If the operator is pinned and its tensors were modified in place since.
        """
        if self._pinned is not None and not transformed() and self._pinned != self._versions():
            raise StaleError(
                "the deviations behind this covariance were changed after it was made (its collector was updated). "
                "Make a new posterior, or one that owns its deviations with posterior(copy=True)."
            )
        return LowRankFactors(self.root, self.diag, self.mix, self.root_scale)

    def capacitance(self, least: str = "storage", projection: Projection | None = None) -> Capacitance:
        """Return the factorisation, computed again only if a tensor was changed in place since the last call.

        Args:
            least: ``"double"`` asks for one from float64 products where the one at hand is from the storage dtype's.
            projection: Taken along if a factorisation is made now.
        """
        factors, versions = self.factors, self._versions()
        if self._core is not self:
            raise AssertionError("an expanded operator factorises its core")
        if self._factored is None or versions is None or self._factored[0] != versions:
            self._factored = (versions or (), factorize(factors, least, projection))
        elif least == "double" and self._factored[1].method == "storage":
            self._factored = (versions, factorize(factors, least, projection))
        return self._factored[1]

    def _require_variances(self) -> None:
        """Raise NotPSDError for negative variances, of which draws would make NaN; once for each state of the tensors.

        On an accelerator nothing is checked, since that would make the host wait.
        """
        if transformed():
            return
        versions = self._versions()
        checked = versions is not None and (
            versions == self._drawable or (self._factored is not None and versions == self._factored[0])
        )
        if checked or self.device.type != "cpu" or not self.diag.numel():
            return
        if not float(self.diag.detach().amin()) >= 0:
            self.capacitance()  # which says what is wrong
        self._drawable = versions

    def _refine(self, result: Ridge) -> None:
        """Keep a finer factorisation that a solve had to make."""
        if self._factored is not None and result.capacitance is not self._factored[1]:
            self._factored = (self._factored[0], result.capacitance)

    @property
    def _core(self) -> Self:
        """The operator without the batch axes that `expand` added; kernels run on it once.

        An expanded operator whose own tensors ask for gradients, which those of its core would not reach, is its own.
        """
        core = self._unexpanded
        if core is None or any(
            own.requires_grad and not theirs.requires_grad
            for own, theirs in ((self.root, core.root), (self.diag, core.diag), (self.mix, core.mix))
        ):
            return self
        return core

    def _derived(self, root: Tensor, diag: Tensor, mix: Tensor, root_scale: Tensor | None) -> Self:
        """Make an operator from changed tensors; it stays pinned if it still shares the pinned root."""
        _ = self.factors  # a stale operator gives no further ones
        result = self.__class__(root, diag, mix, root_scale=root_scale)
        if self._pinned is None or transformed():
            return result
        if root.untyped_storage().data_ptr() == self.root.untyped_storage().data_ptr():
            current = result._versions()
            result._pinned = None if current is None else (self._pinned[0], *current[1:])
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the tensors alone, checked to be current: no cache, no pin, no storage beyond a slice."""
        if self._core is not self:
            return _rebuild_expanded, (self._unexpanded, self.batch_shape)
        return self.__class__, tuple(_compact(tensor) for tensor in vars(self.factors).values())

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        derivatives: tuple[Tensor | None, ...] = LinearOperator._bilinear_derivative(self, left_vecs, right_vecs)
        return derivatives

    def representation(self) -> tuple[Tensor, ...]:
        """Return the tensors, checked to be current: what is rebuilt from them knows of no pin."""
        _ = self.factors
        tensors: tuple[Tensor, ...] = super().representation()
        return tensors

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the diagonal and of every result."""
        return self.diag.dtype

    @property
    def device(self) -> torch.device:
        """The device of the diagonal and of every result."""
        return self.diag.device

    @property
    def rank(self) -> int:
        """The number of columns of the low-rank part R M."""
        return self.root.shape[-1] if self.mix.ndim == 0 else self.mix.shape[-1]

    def _size(self) -> torch.Size:
        return torch.Size((*self.diag.shape, self.diag.shape[-1]))

    @property
    def _linear_op(self) -> LowRankRootLinearOperator:
        """The low-rank part as linear_operator has it; makes R M, a D x K tensor."""
        return LowRankRootLinearOperator(self._mixed_root())

    @property
    def _diag_tensor(self) -> DiagLinearOperator:
        return DiagLinearOperator(self.diag)

    @property
    def linear_ops(self) -> tuple[LinearOperator, ...]:
        """The two summands as linear_operator has them."""
        return (self._linear_op, self._diag_tensor)

    def _mixed_root(self) -> Tensor:
        root = self._decoded().root.to(self.dtype)
        mix = in_dtype(self.mix, self.dtype, self.device)
        return root * mix if mix.ndim == 0 else root @ mix

    def _decoded(self) -> Self:
        """Return the same operator with its root in the dtype of the diagonal."""
        if self.root_scale is None:
            return self
        whole = slice(0, self.shape[-1])
        return self._derived(self.factors.rows(whole, self.dtype).mT, self.diag, self.mix, None)


def _expand(tensor: Tensor, batch: torch.Size, keep: int) -> Tensor:
    """Expand the leading axes to ``batch``; the tensor itself where it has them, so that a leaf stays a leaf."""
    shape = (*batch, *tensor.shape[tensor.ndim - keep :])
    return tensor if tensor.shape == shape else tensor.expand(shape)


def _compact(tensor: Tensor | None) -> Tensor | None:
    """Return a copy of a view of a larger storage, which pickle would write whole; anything else as it is."""
    if tensor is None or tensor.requires_grad:
        return tensor
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor


def _rebuild_expanded(core: LowRankPlusDiagState, batch_shape: torch.Size) -> LinearOperator:
    """Unpickle an operator that `expand` made."""
    return core._expand_batch(batch_shape)


torch.serialization.add_safe_globals([_rebuild_expanded])
