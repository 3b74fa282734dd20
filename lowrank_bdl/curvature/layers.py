"""Layers whose gradients have a known form, and what passes through them in a forward pass.

A layer of weight W computes ``W a`` for one or more inputs a of each example: one of a fully connected layer, one a
position of a convolution (Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers",
ICML 2016). With g the gradient with respect to ``W a``, the example's weight gradient is the sum of ``g a'`` over its
positions, so that a and g are all that any Fisher matrix of W needs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.wrappers import plain_names


@dataclass(frozen=True)
class Layer:
    """A module with a rule, and which of its two parameters a layout holds.

    Attributes:
        name: The module's name in the network.
        module: The module.
        weight: Name of its weight in the layout, None if it is not there.
        bias: Name of its bias, None if it is not there.
    """

    name: str
    module: nn.Module
    weight: str | None
    bias: str | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that are there, the weight first."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def groups(self) -> int:
        """Number of independent parts: those of a grouped convolution, else 1."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, which may be computed from other parameters."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.shape

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies by a matrix (fully connected, convolution); a batch norm multiplies elementwise."""
        return isinstance(self.module, nn.Linear | nn.Conv2d)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether torch's own forward runs: a subclass may use its weight in any other way."""
    method = type(module).forward
    if isinstance(module, nn.Conv2d):
        return method is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward
    return method is (nn.Linear.forward if isinstance(module, nn.Linear) else _BatchNorm.forward)


def find_layers(model: nn.Module, layout: ParameterLayout) -> list[Layer]:
    """List the fully connected, convolution and batch-norm layers with a parameter of their own in the layout.

    Tied parameters are no layer's own.

    Args:
        model: The network.
        layout: The parameters of interest.

    Returns:
        The layers, in the order of ``named_modules()``.

    Raises:
        ShapeError: If a batch norm normalises by batch statistics even in evaluation mode, which makes the examples of
            a batch depend on each other.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.BatchNorm1d(3))
        >>> [(layer.name, layer.parameters) for layer in find_layers(net, ParameterLayout.from_module(net))]
        [('0', ('0.weight', '0.bias')), ('2', ('2.weight', '2.bias'))]
    """
    own = set(layout.names) - {first for _, first in layout.aliases}
    found = []
    plain = plain_names(model)
    for path, module in model.named_modules():
        name = plain(path)
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ShapeError(
                f"Batch-norm layer {name!r} keeps no running statistics, so that no example has a gradient of its own; "
                "expected track_running_stats=True."
            )
        if not isinstance(module, nn.Linear | nn.Conv2d | _BatchNorm) or not _has_own_forward(module):
            continue
        if isinstance(module.weight, Tensor) and not module.weight.numel():
            continue  # of no inputs or no outputs
        names = [f"{name}.{key}" if name else key for key in ("weight", "bias")]
        layer = Layer(name, module, *(key if key in own else None for key in names))
        if layer.parameters:
            found.append(layer)
    return found


# ---- inputs and output gradients an example ---------------------------------------------------------------------


def layer_inputs(layer: Layer, inputs: Tensor) -> Tensor:
    """Return the inputs a of every example and position, at least float32.

    Args:
        layer: A layer that multiplies by a matrix.
        inputs: What entered it: ``(B, *S, m)`` of a fully connected layer, ``(B, C, H, W)`` of a convolution.

    Returns:
        Shape ``(B, groups, m, T)``: m in the order of the weight's rows, T positions.

    Cost: of a convolution, B·C·kernel·T numbers, as ``unfold``.
    """
    module = layer.module
    inputs = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
    if not isinstance(module, nn.Conv2d):
        return inputs.flatten(1, -2).mT.unsqueeze(1) if inputs.ndim > 2 else inputs[:, None, :, None]
    kernel, dilation, stride = _pair(module.kernel_size), _pair(module.dilation), _pair(module.stride)
    if module.padding == "valid":
        margins = [(0, 0), (0, 0)]
    elif module.padding == "same":  # torch puts the odd one out below and to the right
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        margins = [(total // 2, total - total // 2) for total in totals]
    else:
        margins = [(size, size) for size in _pair(module.padding)]
    if any(size for margin in margins for size in margin):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = pad(inputs, [*margins[1], *margins[0]], mode=mode)
    patches: Tensor = unfold(inputs, kernel, dilation, 0, stride).unflatten(1, (module.groups, -1))
    return patches


def layer_gradients(layer: Layer, gradients: Tensor) -> Tensor:
    """Return the gradients g of every example and position, at least float32.

    Args:
        layer: A layer that multiplies by a matrix.
        gradients: With respect to its output: ``(B, *S, o)`` or ``(B, C, H, W)``.

    Returns:
        Shape ``(B, groups, o, T)``, positions as in :func:`layer_inputs`.
    """
    gradients = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
    if isinstance(layer.module, nn.Conv2d):
        grouped: Tensor = gradients.flatten(2).unflatten(1, (layer.groups, -1))
        return grouped
    return gradients.flatten(1, -2).mT.unsqueeze(1) if gradients.ndim > 2 else gradients[:, None, :, None]


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple) else (value, value)


# ---- recording --------------------------------------------------------------------------------------------------


@dataclass
class LayerCall:
    """One call of a layer in a forward pass.

    Attributes:
        inputs: What entered it; not copied.
        output: What it gave, before anything downstream could change it in place.
        result: The copy of it that the network went on with.
        version: The input's version when it was recorded.
    """

    inputs: Tensor
    output: Tensor
    result: Tensor
    version: int

    def check(self, layer: Layer) -> None:
        """Raise ShapeError if the input has been overwritten since."""
        if self.inputs._version != self.version:
            raise ShapeError(f"The input of layer {layer.name!r} must not be changed in place after the layer used it.")


@contextmanager
def recorded(layers: Mapping[str, Layer]) -> Iterator[dict[str, list[LayerCall]]]:
    """Record the calls of layers for the length of a ``with`` block.

    Args:
        layers: By name.

    Yields:
        Layer name to its calls so far, in their order.
    """
    calls: dict[str, list[LayerCall]] = {name: [] for name in layers}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            inputs = args[0] if args else kwargs["input"]
            result = output.clone()  # the network may go on in place: `output` must stay what the layer gave
            calls[name].append(LayerCall(inputs, output, result, inputs._version))
            return result

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.module.register_forward_hook(hook_for(name), with_kwargs=True, prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
