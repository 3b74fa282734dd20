"""Gradients of a loss at the present weights: of a mini-batch's mean, or of each of its examples."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_bdl.curvature.examples import ExampleGradients
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.batches import CallFn, TargetFn, joined, split_batch
from lowrank_bdl.parameters.functional import StatelessModel, evaluation_mode
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.loss_terms import LossFn, LossTerms, NumTerms, Reduction

BatchNormMode: TypeAlias = Literal["eval", "train"]


@contextmanager
def batch_norm_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[nn.Module]:
    """Put a network into evaluation mode, and its batch-norm layers into ``mode``, for the length of a ``with`` block.

    Args:
        model: The network; every flag is set back on leaving.
        mode: ``"eval"`` normalises by the stored statistics, ``"train"`` by those of the batch.

    Yields:
        The same module.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with batch_norm_mode(net.eval(), "train"):
        ...     print(net[0].training, net[1].training)
        True False
    """
    with evaluation_mode(model):
        for module in model.modules():
            if mode == "train" and isinstance(module, _BatchNorm):
                module.training = True
        yield model


def check_modes(reduction: str, bn_mode: str) -> None:
    """Raise ValueError unless both are known."""
    for name, value, known in (("reduction", reduction, ("mean", "sum")), ("bn_mode", bn_mode, ("eval", "train"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


class LossGradients:
    """Gradients of ``loss_fn(model(x), y)`` with respect to some of a network's weights, as flat vectors.

    The network is not changed: dropout is off, batch norm is in the mode asked for, and what a forward pass writes
    into buffers is dropped. Inference mode must be off.

    Args:
        model: The network.
        layout: With respect to which parameters.
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar.
        reduction: Whether that is the mean or the sum over the examples of a batch.
        num_terms: What a mean divides by; see `LossTerms`.
        bn_mode: See `batch_norm_mode`.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None calls ``model(x)``, or
            ``model(**entries).logits`` on a mapping without its targets.
        target_fn: ``target_fn(batch)`` gives the targets; None takes y, or a mapping's ``labels`` or ``targets``.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> gradients = LossGradients(net, ParameterLayout.from_module(net), lambda f, y: (f - y).mean())
        >>> gradients.of_batch((torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.zeros(2, 1)), 2)
        (tensor([2., 4.]), 2)
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        loss_fn: LossFn,
        *,
        reduction: Reduction = "mean",
        bn_mode: BatchNormMode = "eval",
        num_terms: NumTerms | None = None,
        call_fn: CallFn | None = None,
        target_fn: TargetFn | None = None,
    ) -> None:
        check_modes(reduction, bn_mode)
        self.model, self.layout, self.bn_mode = model, layout, bn_mode
        self._terms = LossTerms(loss_fn, reduction, num_terms)
        self._network = StatelessModel(model, call_fn)
        self._target_fn = target_fn
        self._each = ExampleGradients(self._outputs, self._terms.total)

    def split(self, batch: Any) -> tuple[Any, Any, int]:
        """Return a batch ``(x, y)`` on the model's device, and its number of examples, as `split_batch`."""
        return split_batch(batch, self._network.device, self._target_fn)

    def of_batch(self, batch: tuple[Any, Tensor], size: int) -> "tuple[Tensor, Tensor | float]":
        """Return the gradient of the sum of a batch's terms over its examples, ``(D,)``, and the number of terms.

        Args:
            batch: ``(x, y)`` as :meth:`split` gives it.
            size: Its number of examples.

        Raises:
            ShapeError: If the loss is no scalar, or does not depend on the weights.

        Cost: a forward and a backward pass.
        """
        with batch_norm_mode(self.model, self.bn_mode), torch.enable_grad():
            weights = {name: weight.requires_grad_() for name, weight in self._weights().items()}
            outputs = self._outputs(weights, *batch)
            loss, number = self._terms.total(outputs, batch[1]), self._terms.number(outputs, batch[1])
            if not loss.requires_grad:
                raise ShapeError(f"The loss must depend on the {len(weights)} parameters given; it does not.")
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        named = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(weights.items(), found, strict=True)
        }
        return self.layout.flatten(named).div_(size), number

    @torch.no_grad()
    def number_of_terms(self, batch: tuple[Any, Tensor], first: int) -> "Tensor | float":
        """Return the number of terms of the ``first`` examples of a batch.

        Cost: a forward pass unless the targets alone tell.
        """
        inputs, targets = batch
        found = self._terms.number_by_targets(targets[:first])
        if found is not None:
            return found
        with batch_norm_mode(self.model, self.bn_mode):
            outputs = self._outputs(self._weights(), inputs, targets)
        return self._terms.number(outputs[:first], targets[:first])

    def of_examples(self, batch: tuple[Any, Tensor]) -> Iterator[Tensor]:
        """Yield the gradients of the sum of each example's terms, shape ``(B, D)`` with B bounded by memory.

        Args:
            batch: ``(x, y)`` as :meth:`split` gives it, the examples being those of y's first axis.

        Raises:
            ShapeError: If the loss of an example is no scalar, or the examples cannot be told apart; see
                `ExampleGradients`.

        Cost: see `ExampleGradients`.
        """
        found = self._each(self._weights(), *batch)
        while True:
            with batch_norm_mode(self.model, self.bn_mode), torch.enable_grad():
                named = next(found, None)
            if named is None:
                return
            yield self.layout.flatten(named)

    def _weights(self) -> dict[str, Tensor]:
        return dict(zip(self.layout.names, (p.detach() for p in self.layout.parameters_of(self.model)), strict=True))

    def _outputs(self, weights: Mapping[str, Tensor], inputs: Any, targets: Any) -> Any:
        return self._network(weights, joined(inputs, targets))
