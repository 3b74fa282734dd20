r"""The diagonal of the Fisher matrix, :math:`\sum_n E[(\nabla_\theta \log p(y \mid f_n))^2]`, example by example.

The square of a batch's mean gradient is no estimate of it: it shrinks with the batch size and mixes the examples.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_bdl.curvature.examples import ExampleGradients
from lowrank_bdl.curvature.kronecker_factors import example_chunks
from lowrank_bdl.curvature.layers import Layer, LayerCall, layer_gradients, layer_inputs
from lowrank_bdl.linalg.precision import exact, exact_methods
from lowrank_bdl.parameters.batches import joined
from lowrank_bdl.parameters.functional import StatelessModel


def layer_chunks(layer: Layer, gradients: Sequence[Tensor]) -> Iterator[slice]:
    """Yield slices of a batch whose gradients an example, and unfolded inputs, have a bounded size.

    Args:
        layer: The layer.
        gradients: With respect to the output of each of its calls.

    Yields:
        Slices that cover the batch in order.
    """
    numbers = 1
    if layer.is_matrix:
        shape = layer.shape
        positions = sum(gradient[0].numel() for gradient in gradients) // shape[0]
        numbers = max(shape.numel(), layer.groups * shape[1:].numel() * positions)
    yield from example_chunks(len(gradients[0]), numbers)


@exact
def layer_example_gradients(
    layer: Layer, calls: Sequence[LayerCall], gradients: Sequence[Tensor], part: slice
) -> dict[str, Tensor]:
    """Return the gradients an example of a layer's parameters, from what passed through it.

    Args:
        layer: The layer.
        calls: All calls of it in the forward pass.
        gradients: With respect to the output of each.
        part: Which examples.

    Returns:
        Parameter name to ``(examples, *shape)``, at least float32.
    """
    if not layer.is_matrix:
        return _batch_norm_gradients(layer, calls, gradients, part)
    left = _joined([layer_gradients(layer, gradient[part]) for gradient in gradients])
    found = {}
    if layer.weight is not None:
        right = _joined([layer_inputs(layer, call.inputs[part]) for call in calls])
        found[layer.weight] = (left @ right.mT).view(len(left), *layer.shape)
    if layer.bias is not None:
        found[layer.bias] = left.sum(-1).flatten(1)
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # cat copies even a single tensor


def _batch_norm_gradients(
    layer: Layer, calls: Sequence[LayerCall], gradients: Sequence[Tensor], part: slice
) -> dict[str, Tensor]:
    module = layer.module
    assert isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    totals: dict[str, Tensor] = {}
    for call, gradient in zip(calls, gradients, strict=True):
        slope = gradient[part].to(torch.promote_types(gradient.dtype, torch.float32))
        shape = (1, -1, *[1] * (slope.ndim - 2))
        deviation = (module.running_var.to(slope.dtype) + module.eps).sqrt().view(shape)
        normalised = (call.inputs[part].detach() - module.running_mean.to(slope.dtype).view(shape)) / deviation
        for name, product in ((layer.weight, slope * normalised), (layer.bias, slope)):
            if name is not None:
                total = product.reshape(*product.shape[:2], -1).sum(-1)
                totals[name] = totals[name] + total if name in totals else total
    return totals


@exact_methods
class LayerDiagonal:
    """Sum squared gradients of one layer's parameters from what passes through it: no backward pass an example.

    Args:
        layer: A layer with a rule.

    Attributes:
        sums: Parameter name to its diagonal, in the parameter's shape, float64.

    Cost: float64 sums of the parameters' size; gradients an example of a bounded number of examples at one time, and
    none for a fully connected layer without positions, whose sum is one product ``(g²)' a²``.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.sums: dict[str, Tensor] = {}
        for name, key in ((layer.weight, "weight"), (layer.bias, "bias")):
            if name is not None:
                self.sums[name] = torch.zeros_like(layer.module.get_parameter(key).detach(), dtype=torch.float64)

    def add(self, calls: Sequence[LayerCall], gradients: Sequence[Tensor]) -> None:
        """Add one batch under one vector of scores.

        Args:
            calls: All calls of the layer in the forward pass.
            gradients: With respect to the output of each.

        Raises:
            ShapeError: If an input has been overwritten since.
        """
        for call in calls:
            call.check(self.layer)
        layer = self.layer
        if layer.is_matrix and layer.weight is not None and len(calls) == 1 and calls[0].inputs.ndim == 2:
            left = layer_gradients(layer, gradients[0])[:, 0, :, 0].square()
            self.sums[layer.weight] += left.mT @ layer_inputs(layer, calls[0].inputs)[:, 0, :, 0].square()
            if layer.bias is not None:
                self.sums[layer.bias] += left.sum(0)
            return
        for part in layer_chunks(layer, gradients) if calls else ():
            for name, found in layer_example_gradients(layer, calls, gradients, part).items():
                self.sums[name] += found.square().sum(0)

    def add_output_fisher(self, call: LayerCall, diagonal: Tensor) -> None:
        """Add one batch, where the output of a fully connected layer is the network's.

        Args:
            call: Its only call.
            diagonal: That of E[s s'] of each example and position, shape ``(B T, o)``.

        Raises:
            ShapeError: If the input has been overwritten since.
        """
        call.check(self.layer)
        if self.layer.weight is not None:
            inputs = call.inputs.detach().flatten(0, -2).to(diagonal.dtype)
            self.sums[self.layer.weight] += diagonal.mT @ inputs.square()
        if self.layer.bias is not None:
            self.sums[self.layer.bias] += diagonal.sum(0)


class ExampleDiagonal:
    """Sum squared gradients of any parameters by one backward pass an example; see `ExampleGradients`.

    Args:
        network: The network.
        weights: Every weight by name.
        names: Those whose diagonal is wanted.

    Attributes:
        sums: Parameter name to its diagonal, in the parameter's shape, float64.

    Cost: a forward and a backward pass an example and vector of scores; gradients of bounded total size at one time.
    """

    def __init__(self, network: StatelessModel, weights: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._chosen = {name: weights[name].detach() for name in names}
        fixed = {name: weight.detach() for name, weight in weights.items() if name not in self._chosen}
        self._each = ExampleGradients(
            lambda chosen, inputs, scores: network({**fixed, **chosen}, joined(inputs)),
            lambda outputs, scores: (outputs * scores).sum(),
        )
        self.sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in self._chosen.items()}

    def add(self, inputs: Any, scores: Tensor) -> None:
        """Add one batch under one vector of scores.

        Args:
            inputs: What the network takes.
            scores: Gradients with respect to its output, the examples first.
        """
        for found in self._each(self._chosen, inputs, scores):
            for name, gradients in found.items():
                wide = torch.promote_types(gradients.dtype, torch.float32)
                self.sums[name] += gradients.to(wide).square().sum(0)
