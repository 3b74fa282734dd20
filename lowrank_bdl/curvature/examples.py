"""Gradients of one example at a time, wherever a network has its examples."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from lowrank_bdl.curvature.kronecker_factors import example_chunks
from lowrank_bdl.errors import LowRankBDLError, ShapeError
from lowrank_bdl.linalg.devices import norm_in_float64

Weights: TypeAlias = dict[str, Tensor]
Forward: TypeAlias = Callable[[Mapping[str, Tensor], Any, Tensor], Any]
Value: TypeAlias = Callable[[Any, Tensor], Tensor]


class ExampleGradients:
    """Gradients, for each example, of a scalar of its output.

    Which axis of the inputs has the examples is not taken for granted (recurrent layers of torch have the time first):
    the first and the last example, evaluated alone along an axis, must give the first and the last row of the batch's
    output. Gradients are then taken example by example, several at once by ``vmap`` where every operation has a
    batching rule. Where no axis does that, each example's output is differentiated through the graph of its batch.

    Args:
        forward: ``forward(weights, inputs, targets)`` gives the outputs.
        value: ``value(outputs, targets)`` gives the scalar for a batch, here of one example.

    Example:
        >>> each = ExampleGradients(lambda w, x, y: x @ w["w"], lambda f, y: (f * y).sum())
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2)
        >>> [found["w"].tolist() for found in each({"w": torch.zeros(2)}, x, y)]
        [[[1.0, 2.0], [3.0, 4.0]]]
    """

    def __init__(self, forward: Forward, value: Value) -> None:
        self._forward, self._value = forward, value
        self._axis: int | None = None
        self._vectorize = True

    def __call__(self, weights: Mapping[str, Tensor], inputs: Any, targets: Tensor) -> Iterator[Weights]:
        """Yield the gradients of the next few examples, of bounded total size.

        Args:
            weights: What to differentiate by.
            inputs: A tensor, or any structure of such.
            targets: Shape ``(N, ...)``; handed to ``value`` example by example.

        Yields:
            Name to ``(examples, *shape)``, in the order of the examples.

        Raises:
            ShapeError: If the examples cannot be told from each other in the inputs, and the output is no tensor with
                one row for each of them.

        Cost: a forward and a backward pass an example; of the whole batch where its inputs cannot be divided.
        """
        weights = {name: weight.detach() for name, weight in weights.items()}
        axis = self._find_axis(weights, inputs, targets)
        chunks = example_chunks(len(targets), sum(weight.numel() for weight in weights.values()))
        if axis is None:
            yield from self._within_batch(weights, inputs, targets, chunks)
            return
        for part in chunks:
            yield self._alone(weights, _rows(inputs, axis, part), targets[part], axis)

    # ---- where the examples are -------------------------------------------------------------------------------------

    def _find_axis(self, weights: Weights, inputs: Any, targets: Tensor) -> int | None:
        leaves, count = pytree.tree_leaves(inputs), len(targets)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return None
        lengths = [{axis for axis, size in enumerate(leaf.shape) if size == count} for leaf in leaves]
        candidates = sorted(set.intersection(*lengths))
        if self._axis is not None:
            return self._axis if self._axis in candidates else None
        if not candidates:
            return None
        outputs = self._forward(weights, inputs, targets)
        found = next((axis for axis in candidates if self._divides(axis, outputs, weights, inputs, targets)), None)
        if count > 1:  # a batch of one example does not show where others would be
            self._axis = found
        return found

    def _divides(self, axis: int, outputs: Any, weights: Weights, inputs: Any, targets: Tensor) -> bool:
        """Whether the first and the last example alone give the first and the last row of the outputs."""
        flags = []
        for number in {0, len(targets) - 1}:
            part = slice(number, number + 1)
            try:
                alone = self._forward(weights, _rows(inputs, axis, part), targets[part])
            except LowRankBDLError:
                raise
            except (RuntimeError, ValueError, IndexError):  # not the axis, or an operation on the whole batch
                return False
            rows = _are_rows(pytree.tree_leaves(alone), pytree.tree_leaves(outputs), part, len(targets))
            if not rows:
                return False
            flags += rows
        return bool(torch.stack(flags).all())  # one host synchronisation

    # ---- gradients --------------------------------------------------------------------------------------------------

    def _alone(self, weights: Weights, inputs: Any, targets: Tensor, axis: int) -> Weights:
        def value(own: Mapping[str, Tensor], x: Any, y: Tensor) -> Tensor:
            batch = pytree.tree_map(lambda leaf: leaf.unsqueeze(axis), x), y.unsqueeze(0)
            return self._value(self._forward(own, *batch), batch[1])

        if self._vectorize:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # a loop inside vmap is no news
                    found: Weights = vmap(grad(value), in_dims=(None, axis, 0))(weights, inputs, targets)
                if not any(gradient.is_sparse for gradient in found.values()):
                    return found
            except LowRankBDLError:
                raise
            except (RuntimeError, ValueError):  # no batching rule (recurrent layers), or derivatives inside the network
                pass
            self._vectorize = False

        def gradients(number: int) -> Weights:
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            part = slice(number, number + 1)
            return _gradients(
                self._value(self._forward(leaves, _rows(inputs, axis, part), targets[part]), targets[part]), leaves
            )

        return _stack([gradients(number) for number in range(len(targets))])

    def _within_batch(
        self, weights: Weights, inputs: Any, targets: Tensor, chunks: Iterator[slice]
    ) -> Iterator[Weights]:
        leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
        outputs = self._forward(leaves, inputs, targets)
        count = len(targets)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != count:
            form = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ShapeError(
                f"Gradients an example need inputs with the {count} examples on one axis, or one tensor of outputs "
                f"with a row for each of them; got outputs of {form}."
            )
        for part in chunks:
            rows = [slice(number, number + 1) for number in range(*part.indices(count))]
            yield _stack([_gradients(self._value(outputs[row], targets[row]), leaves) for row in rows])


def _rows(inputs: Any, axis: int, part: slice) -> Any:
    return pytree.tree_map(lambda leaf: leaf[(slice(None),) * axis + (part,)], inputs)


def _are_rows(alone: list[Any], every: list[Any], part: slice, count: int) -> list[Tensor]:
    """Flags: whether what one example gave is its row of what the batch gave, for whatever has rows of one shape."""
    if len(alone) != len(every):
        return []
    flags = []
    for one, each in zip(alone, every, strict=True):
        if isinstance(one, Tensor) and isinstance(each, Tensor) and each.ndim and len(each) == count:
            row = each[part]
            if one.shape != row.shape:
                return []
            wide = torch.promote_types(one.dtype, torch.float32)
            bound = torch.finfo(one.dtype).eps ** 0.5 if one.is_floating_point() else 0.0
            distance, size = (norm_in_float64(v.detach().to(wide)) for v in (one - row, row))
            flags.append(distance <= bound * size)
    return flags


def _gradients(value: Tensor, leaves: Mapping[str, Tensor]) -> Weights:
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _stack(each: list[Weights]) -> Weights:
    return {name: torch.stack([gradients[name] for gradients in each]) for name in each[0]}
