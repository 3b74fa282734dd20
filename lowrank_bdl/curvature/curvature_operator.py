"""What the Hessian, the generalised Gauss-Newton and the Fisher matrix have in common as linear operators."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn, TypeAlias, cast

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_bdl.curvature.backward import Backward, differentiable_kernels, is_missing_derivative, vectors_at_once
from lowrank_bdl.curvature.loss_gradients import BatchNormMode, batch_norm_mode, check_modes
from lowrank_bdl.errors import LowRankBDLError, NonFiniteError, ShapeError, StaleError
from lowrank_bdl.linalg.devices import norm_in_float64, to_float64
from lowrank_bdl.linalg.exact import DENSE_LIMIT_GIB, check_dense_size
from lowrank_bdl.linalg.expanded import UnbatchedLinearOperator
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.precision import own_precision
from lowrank_bdl.parameters.batches import CallFn, Data, TargetFn, fixed_batches, joined, split_batch
from lowrank_bdl.parameters.differentiable_operations import lacks_second_derivatives
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.parameters.wrappers import named_parameters, uncompiled

Vectors: TypeAlias = Sequence[Tensor | None]
Product: TypeAlias = Callable[[Sequence[Tensor]], Vectors]

_NUMBERS_AT_ONCE = 2**24
"""Entries of the unit vectors that are multiplied in one pass over the data for parts of the matrix."""


class CurvatureLinearOperator(UnbatchedLinearOperator):
    """A symmetric D x D matrix that is a mean over the examples of a data set, known by its products with vectors.

    Subclasses say what one batch contributes. The weights are those that the model had when the operator was made
    (:attr:`theta`); everything else in the model is read at every product and must stay as it was. The model is not
    changed: modes are set back, what is written into buffers is dropped, ``.grad`` is not touched.

    Args:
        model: The network.
        data: See `fixed_batches`.
        layout: Which parameters are the coordinates; None takes those that ``include`` and ``exclude`` keep.
        include: See `ParameterLayout.from_module`.
        exclude: Likewise.
        bn_mode: See `batch_norm_mode`.
        chunk_size: How many vectors go through a graph at once; None decides by memory.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None is `call_on_inputs`.
        target_fn: ``target_fn(batch)`` gives the targets; None is `targets_of`.

    Attributes:
        layout: Names, shapes and order of the D coordinates.
        theta: The weights, shape ``(D,)``.
        num_data: Number of examples N; None before the first pass over the data.
    """

    num_data: int | None

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        layout: ParameterLayout | None,
        include: "Selector | None",
        exclude: "Selector | None",
        bn_mode: BatchNormMode,
        chunk_size: int | None,
        call_fn: CallFn | None,
        target_fn: TargetFn | None,
    ) -> None:
        if layout is not None and not (include is None and exclude is None):
            raise ValueError("a layout says which parameters to take; expected no include or exclude beside it.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
        check_modes("mean", bn_mode)
        self.layout = ParameterLayout.from_module(model, include, exclude) if layout is None else layout
        with torch.inference_mode(False):
            self.theta = self.layout.flatten(model)
        super().__init__(self.theta)
        self.num_data = None
        self._network = FunctionalModel(model, self.layout, call_fn)
        self._batches = fixed_batches(data)
        self._target_fn = target_fn
        self._bn_mode: BatchNormMode = bn_mode
        self._chunk_size = chunk_size
        self._seed: int | None = None
        self._num_terms: Tensor | float = 0  # of the batch that was linearised last, in the mean
        self._backward = Backward()
        self._fused = not lacks_second_derivatives(model)
        self._at_once: int | None = None
        self._fixed = self._fingerprint()

    # ---- one batch --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _linearize(
        self, weights: dict[str, Tensor], inputs: Any, targets: Tensor, generator: torch.Generator | None
    ) -> Product:
        """Return the map from c vectors ``(c, *shape)`` of every parameter to their products with a batch's matrix."""

    def _outputs(self, weights: Mapping[str, Tensor], inputs: Any, targets: Tensor) -> Any:
        own = set(self.layout.names)
        model = self._network.stateless.model
        rest = {name: tensor.detach() for name, tensor in named_parameters(model).items() if name not in own}
        return self._network.stateless({**rest, **weights}, joined(inputs, targets))

    # ---- products ---------------------------------------------------------------------------------------------------

    def _size(self) -> torch.Size:
        return torch.Size((self.layout.numel,) * 2)

    def matmul(self, other: Tensor | LinearOperator) -> Any:
        """Return the product with vectors ``(*B, D, K)`` or ``(D,)``, or lazily with an operator.

        Args:
            other: In the dtype and on the device of :attr:`theta`.

        Returns:
            A tensor of the same shape, differentiable with respect to the vectors.

        Raises:
            ShapeError: If the vectors do not have D rows.
            TypeError: If their dtype or device is another one.
            StaleError: If the rest of the model has changed since the operator was made.
        """
        if other.ndim == 0 or other.shape[-1 if other.ndim == 1 else -2] != self.layout.numel:
            raise ShapeError(f"vectors must have {self.layout.numel} rows; got shape {tuple(other.shape)}.")
        return super().matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dtype != self.dtype or rhs.device != self.device:
            raise TypeError(
                f"vectors must be {self.dtype} on {self.device} as the weights are; got {rhs.dtype} on {rhs.device}."
            )
        columns = rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs
        rows = columns.detach().mT.reshape(-1, self.layout.numel)
        result = self._products(rows).view(columns.mT.shape).mT
        return result.squeeze(-1) if rhs.ndim == 1 else result

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return self._matmul(rhs)

    def _products(self, rows: Tensor) -> Tensor:
        """Multiply K vectors ``(K, D)`` in one pass over the data; as many rows come back."""
        self._require_unchanged()
        if len(rows) > 1:
            require_memory(rows.nbytes, rows.device, f"a block of {len(rows)} products of {rows.shape[1]:,} numbers")
        try:
            return self._pass(rows)
        except RuntimeError as error:
            if not self._fused or not is_missing_derivative(error):
                raise
            self._fused = False  # a fused kernel has no second derivative: once more without such
            return self._pass(rows)

    def _pass(self, rows: Tensor) -> Tensor:
        model, device = self._network.stateless.model, self._network.stateless.device
        generator = None if self._seed is None else torch.Generator().manual_seed(self._seed)
        total, terms = 0, cast("Tensor | float", 0)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))  # whose tensors cannot be differentiated by
            stack.enter_context(torch.enable_grad())
            stack.enter_context(own_precision(network=True))
            stack.enter_context(batch_norm_mode(model, self._bn_mode))
            stack.enter_context(uncompiled())  # what is compiled has no second derivative
            if not self._fused:
                stack.enter_context(differentiable_kernels())
            result = torch.zeros_like(rows)
            leaves = self._network.named(self.theta)
            weights = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
            for batch in self._batches:
                inputs, targets, size = split_batch(batch, device, self._target_fn)
                step = self._rows_at_once(len(rows), weights, inputs, targets)
                product = self._linearize(weights, inputs, targets, generator)
                for start in range(0, len(rows), step):
                    part = slice(start, start + step)
                    self._add(result[part], product(self._split(rows[part])))
                total, terms = total + size, terms + self._num_terms
            self._count(total)
            return result.div_(terms.to(result) if isinstance(terms, Tensor) else terms)

    def _rows_at_once(self, count: int, weights: Mapping[str, Tensor], inputs: Any, targets: Tensor) -> int:
        if count <= 1 or self._chunk_size is not None:
            return max(1, count if self._chunk_size is None else self._chunk_size)
        if self._at_once is None:
            size = 2 * self.theta.nbytes
            self._at_once = vectors_at_once(lambda: self._outputs(weights, inputs, targets), size, self.theta.device)
        return self._at_once if self._backward.vectorize else 1

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Return the parts ``(c, *shape)`` of each parameter, in its present dtype and on its device."""
        own = self.layout.parameters_of(self._network.stateless.model)
        return [part.to(like) for part, like in zip(self.layout.unflatten(rows).values(), own, strict=True)]

    def _add(self, result: Tensor, parts: Vectors) -> None:
        for part, where in zip(parts, self.layout.slices.values(), strict=True):
            if part is not None:
                own = result[:, where]
                own.add_(part.detach().to(result).reshape(own.shape))

    def _count(self, total: int) -> None:
        if total == 0:
            raise ShapeError("The data must hold at least one example; got none.")
        if self.num_data not in (None, total):
            raise LowRankBDLError(
                f"every product must see the same data: expected {self.num_data} examples, got {total}. Read them in "
                "a fixed order, without leaving any out at random."
            )
        self.num_data = total

    # ---- what must not change ---------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, tuple[int, int, int]]:
        """What identifies every tensor that the matrix depends on beside the weights; no values are read."""
        model, own = self._network.stateless.model, set(self.layout.names)
        tensors: dict[str, Tensor] = {n: p for n, p in named_parameters(model).items() if n not in own}
        for prefix, module in model.named_modules():
            if self._bn_mode == "eval" or not isinstance(module, _BatchNorm):
                for name, buffer in module.named_buffers(prefix, recurse=False):
                    tensors[name] = buffer
        return {
            name: (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for name, tensor in tensors.items()
        }

    def _require_unchanged(self) -> None:
        present = self._fingerprint()
        changed = [name for name, mark in self._fixed.items() if present.get(name) != mark]
        if changed:
            raise StaleError(
                "the curvature is that of the model as it was when the operator was made; "
                f"{changed[0]!r} has changed since. Make a new operator."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fixed = self._fingerprint()  # copies of the tensors are other objects

    def _run_check(self) -> None:
        """Raise unless the matrix is the same twice, symmetric and finite, as far as two vectors show."""
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(2, self.layout.numel, generator=generator).to(self.theta)
        left, right = self._products(probes)
        again = self._product_again(probes[:1], left)
        if not bool(left.isfinite().all() & right.isfinite().all()):
            raise NonFiniteError("the curvature must be finite; a product with it holds NaN or infinite entries.")
        tolerance = self._rounding() ** 0.5
        norms = [float(norm_in_float64(v)) for v in (left, right, again - left)]
        if norms[2] > tolerance * norms[0]:
            raise LowRankBDLError(
                "every product must see the same function of the weights: a second product with a vector differs by "
                f"{norms[2] / norms[0]:.1e} of its norm. Data that are shuffled or augmented anew in every pass, and "
                "dropout that is on in evaluation mode, do that; check=False leaves this out."
            )
        sides = [float(to_float64(probes[0]) @ to_float64(right)), float(to_float64(probes[1]) @ to_float64(left))]
        if abs(sides[0] - sides[1]) > tolerance * max(norms[:2]):  # u'(H - H')v is about |(H - H')v|
            raise LowRankBDLError(
                f"the matrix must be symmetric; for two vectors u'Hv is {sides[0]:.6g} and v'Hu is {sides[1]:.6g}. An "
                "operation with a wrong second derivative (a backward pass that is detached) does that; "
                "check=False leaves this out."
            )

    def _product_again(self, probe: Tensor, first: Tensor) -> Tensor:
        """Return a second product ``(D,)`` with a vector ``(1, D)``; ``first`` is what a block gave for it."""
        return self._products(probe)[0]

    def _rounding(self) -> float:
        """Relative spacing of numbers in the least precise dtype among the parameters."""
        own = self.layout.parameters_of(self._network.stateless.model)
        return max(torch.finfo(parameter.dtype).eps for parameter in own)

    # ---- a linear operator ------------------------------------------------------------------------------------------

    def at(self, theta: Tensor) -> "CurvatureLinearOperator":
        """Return the same matrix at other weights, the rest of the model being as it was.

        Args:
            theta: Shape ``(D,)``; cast to the operator's dtype and device, and not copied where they are the same.

        Returns:
            An operator of the same class, on the same data, not checked again. With ``bn_mode="eval"`` the statistics
            are those of the model, which other weights may not fit.

        Raises:
            ShapeError: If ``theta`` is not ``(D,)``.
        """
        if theta.shape != self.theta.shape:
            raise ShapeError(f"theta must have shape {tuple(self.theta.shape)}; got {tuple(theta.shape)}.")
        self._require_unchanged()
        other = copy.copy(self)
        other.__dict__.pop("_memoize_cache", None)
        other.theta = theta.detach().to(self.theta)
        LinearOperator.__init__(other, other.theta)
        return other

    def representation_tree(self) -> Any:
        """Return what rebuilds the operator from :attr:`theta`, as sums and multiples of operators do."""
        return lambda theta: self if theta is self.theta else self.at(theta)

    def _transpose_nonbatch(self) -> "CurvatureLinearOperator":
        return self

    def detach(self) -> "CurvatureLinearOperator":
        """Return the operator itself: it has no derivative with respect to the weights."""
        return self

    def clone(self) -> "CurvatureLinearOperator":
        """Return the operator with a copy of its weights."""
        return self.at(self.theta.clone())

    def _set_requires_grad(self, val: bool) -> None:
        if val:
            raise NotImplementedError("a curvature operator has no derivative with respect to the weights.")

    def to(self, *args: Any, **kwargs: Any) -> "CurvatureLinearOperator":
        """Return the operator itself if it is of that dtype and device.

        Raises:
            TypeError: If it is not: the network decides where and how precisely it computes.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        elsewhere = device is not None and torch.empty(0, device=device).device != self.device
        if elsewhere or dtype not in (None, self.dtype):
            raise TypeError(
                f"the operator computes in {self.dtype} on {self.device} as the model does; expected that, got "
                f"{dtype or self.dtype} on {device or self.device}. Move the model and make a new operator."
            )
        return self

    def type(self, dtype: torch.dtype) -> "CurvatureLinearOperator":
        """As :meth:`to`."""
        return self.to(dtype)

    def cpu(self) -> "CurvatureLinearOperator":
        """As :meth:`to`."""
        return self.to("cpu")

    def cuda(self, device_id: int | None = None) -> "CurvatureLinearOperator":
        """As :meth:`to`."""
        return self.to("cuda" if device_id is None else f"cuda:{device_id}")

    # ---- parts of the matrix ----------------------------------------------------------------------------------------

    def _columns(self, index: Tensor) -> Tensor:
        """Return columns of the matrix as rows ``(len(index), D)``."""
        result = self.theta.new_empty(len(index), self.layout.numel)
        step = max(1, _NUMBERS_AT_ONCE // max(1, self.layout.numel))
        for start in range(0, len(index), step):
            part = index[start : start + step, None]
            unit = torch.zeros_like(result[start : start + step]).scatter_(1, part, 1)
            result[start : start + step] = self._products(unit)
        return result

    def _diagonal(self) -> Tensor:
        everything = torch.arange(self.layout.numel, device=self.theta.device)
        return self._get_indices(everything, everything)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        rows, columns = torch.broadcast_tensors(row_index, col_index)
        result = self.theta.new_empty(rows.shape)
        wanted, where = columns.unique(return_inverse=True)
        step = max(1, _NUMBERS_AT_ONCE // max(1, self.layout.numel))
        for start in range(0, len(wanted), step):
            found = self._columns(wanted[start : start + step])
            here = (where >= start) & (where < start + step)
            result[here] = found[where[here] - start, rows[here]]
        return result

    def to_dense(self, limit_gib: float = DENSE_LIMIT_GIB) -> Tensor:
        """Return the matrix as a dense tensor ``(D, D)``, from D products.

        Args:
            limit_gib: The largest result allowed [GiB].

        Raises:
            MemoryLimitError: If the result would be larger than ``limit_gib``.
        """
        check_dense_size(self, limit_gib)
        return self._columns(torch.arange(self.layout.numel, device=self.theta.device)).mT

    # linear_operator's own ways suppose a positive definite matrix and answer without a warning if it is not one.

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "a curvature matrix may be singular or indefinite: no solve, log-determinant, root or draw; add a "
            "multiple of the identity to a positive semi-definite one, or take lanczos()."
        )

    _solve = _cholesky = solve = inv_quad_logdet = _logdet = root_decomposition = root_inv_decomposition = _refuse
    zero_mean_mvn_samples = sqrt_inv_matmul = pivoted_cholesky = _refuse
