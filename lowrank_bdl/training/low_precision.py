"""Training with numbers of few bits: SGD in block floating point, and networks whose weights are on few levels."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.precision import callers_precision
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.substitution import Substitution
from lowrank_bdl.training.checked_optimizer import SGD_BOUNDS, Bound, CheckedOptimizer
from lowrank_bdl.training.quantization import (
    Rounding,
    block_floating_point,
    require_bits,
    round_uniform,
    uniform_step,
)

Blocks: TypeAlias = Literal["tensor", "channel"]

_BITS: Bound = (lambda value: value is None or (isinstance(value, int) and 2 <= value <= 24), "from 2 to 24, or None")


def _block_dim(tensor: Tensor, blocks: Blocks) -> int | None:
    """The axis of a weight whose slices are blocks; biases and scales are one block each."""
    return 0 if blocks == "channel" and tensor.ndim > 1 else None


class LowPrecisionSGD(CheckedOptimizer):
    r"""SGD with momentum whose weights, gradients and accumulators are held in block floating point.

    .. math::
        v \leftarrow Q_m(\mu v + Q_g(g + \lambda \theta)), \qquad \theta \leftarrow Q_w(\theta - \eta v)

    each Q :func:`~lowrank_bdl.training.quantization.block_floating_point`, rounded at random so that steps below the
    weights' resolution are taken on average. Averages of the iterates, taken in full precision
    (``torch.optim.swa_utils.AveragedModel``, :class:`lowrank_bdl.SWAG`), are finer than any iterate: that is SWALP.

    Tensors keep their dtype and hold values that the format has, from the first step on. Networks' outputs and what
    flows back are rounded too inside :func:`low_precision_activations`.

    Args:
        params: Parameters, or groups of them with values of their own.
        lr: η >= 0.
        momentum: μ in [0, 1).
        weight_decay: λ >= 0.
        weight_bits: Of θ, from 2 to 24; None: not rounded.
        gradient_bits: Of g.
        momentum_bits: Of v.
        blocks: ``"tensor"``: an exponent for each tensor; ``"channel"``: one for each slice along a weight's first
            axis.
        rounding: ``"stochastic"`` or ``"nearest"``.
        generator: Source of the rounding, on any device; None takes torch's default generator, whose state
            a :class:`~lowrank_bdl.training.trainer.Trainer` keeps in its checkpoints.

    Raises:
        ValueError: If a value is out of range.
        NonFiniteError: In ``step``, if a gradient is not finite.

    Cost: three roundings a parameter and step, each two reads, a write and a uniform number; one velocity a parameter.

    Source: Yang et al., "SWALP: Stochastic Weight Averaging in Low-Precision Training" (ICML 2019), algorithm 2; there
    v is rounded where it is read, here where it is written, which is the same sequence.

    Example:
        >>> theta = torch.tensor([0.75, -0.5], requires_grad=True)
        >>> sgd = LowPrecisionSGD([theta], lr=0.1, weight_bits=4, rounding="nearest")
        >>> theta.square().sum().backward()
        >>> sgd.step()
        >>> theta  # .6 and -.4, in steps of 2^(-1 - 2)
        tensor([ 0.6250, -0.3750], requires_grad=True)
    """

    bounds: ClassVar[dict[str, Bound]] = {
        **SGD_BOUNDS,
        **dict.fromkeys(("weight_bits", "gradient_bits", "momentum_bits"), _BITS),
        "blocks": (lambda value: value in ("tensor", "channel"), "'tensor' or 'channel'"),
        "rounding": (lambda value: value in ("stochastic", "nearest"), "'stochastic' or 'nearest'"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        weight_bits: int | None = 8,
        gradient_bits: int | None = 8,
        momentum_bits: int | None = 8,
        blocks: Blocks = "tensor",
        rounding: Rounding = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                weight_bits=weight_bits,
                gradient_bits=gradient_bits,
                momentum_bits=momentum_bits,
                blocks=blocks,
                rounding=rounding,
            ),
            generator,
        )

    def _round(self, values: Tensor, bits: int | None, group: dict[str, Any]) -> Tensor:
        if bits is None:
            return values
        dim = _block_dim(values, group["blocks"])
        return block_floating_point(values, bits, block_dim=dim, rounding=group["rounding"], generator=self.generator)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        velocity = self._round(gradient, group["gradient_bits"], group)
        if group["momentum"]:
            state = self.state[parameter]
            if state:
                velocity = velocity.add(state["momentum_buffer"], alpha=group["momentum"])
            velocity = state["momentum_buffer"] = self._round(velocity, group["momentum_bits"], group).clone()
        moved = parameter.sub(velocity, alpha=float(group["lr"]))
        parameter.copy_(self._round(moved, group["weight_bits"], group))


class _RoundBothWays(torch.autograd.Function):
    """A tensor in block floating point, and its gradient as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bits: int, rounding: Rounding, generator: "torch.Generator | None") -> Tensor:
        ctx.settings = bits, rounding, generator
        return block_floating_point(values, bits, rounding=rounding, generator=generator)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        bits, rounding, generator = ctx.settings
        # once more by itself: a second derivative goes through this rounding as well, and does not end at it
        rounded: Tensor = _RoundBothWays.apply(outer, bits, rounding, generator)
        return rounded, None, None, None


@contextmanager
def low_precision_activations(
    model: nn.Module,
    bits: int = 8,
    *,
    rounding: Rounding = "stochastic",
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Inside the block, outputs of a network's layers and the errors that flow back are block floating point.

    Layers are the modules without children. Their outputs are rounded in training mode alone, with one exponent a
    tensor, so that evaluation is exact.

    Args:
        model: Not changed, but for hooks while the block lasts.
        bits: Of a number, from 2 to 24.
        rounding: ``"stochastic"`` or ``"nearest"``.
        generator: Source of the rounding, on any device; None takes torch's default generator.

    Yields:
        Nothing.

    Raises:
        ValueError: If ``bits`` or ``rounding`` is out of range.

    Source: Yang et al. (2019), algorithm 2: Q_A and Q_E.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight, 0.9)
        >>> with low_precision_activations(net, 3, rounding="nearest"):
        ...     net(torch.ones(1, 1)), net.eval()(torch.ones(1, 1))
        (tensor([[0.7500]], grad_fn=<_RoundBothWaysBackward>), tensor([[0.9000]], grad_fn=<MmBackward0>))
    """
    require_bits(bits)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        rounds = module.training and isinstance(output, Tensor) and output.is_floating_point()
        return _RoundBothWays.apply(output, bits, rounding, generator) if rounds else None

    layers = [module for module in model.modules() if not any(module.children())]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class QuantizedModel(nn.Module):
    r"""A network whose weight matrices are rounded to few levels whenever it is called, and trained all the same.

    A weight W of two or more axes is used as :math:`Q_\Delta(W)`, the nearest of the levels
    :math:`\Delta \{-m, \dots, m\}`, :math:`m = 2^{b-1} - 1`; biases and scales of normalisations are used as they are.
    The gradient goes to W as if it had not been rounded (straight through). Steps Δ are those that lose least of the
    weights that the network has now, one a tensor, and stay.

    Args:
        model: The network; training moves its own parameters, which keep their precision.
        bits: b, from 2 to 24.

    Attributes:
        model: As given.
        layout: Of all its parameters.
        bits: As given.

    Raises:
        ValueError: If ``bits`` is out of range.
        ShapeError: If no parameter has two axes.
        NonFiniteError: If a weight is not finite.

    Cost: a forward pass, and a read and a write of the weights.

    Source: Shin, Boo and Sung, "SQWA" (2020), section 2; Hubara et al., "Quantized Neural Networks" (2018).

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[1.0, 0.4]])), net.bias.fill_(0.3)
        >>> QuantizedModel(net, 2)(torch.ones(1, 2))  # 1 + 0 + 0.3
        tensor([[1.3000]], grad_fn=<AddmmBackward0>)
    """

    def __init__(self, model: nn.Module, bits: int) -> None:
        super().__init__()
        require_bits(bits)
        self.model, self.bits = model, bits
        self._substitution = Substitution(model, protect=False)
        self.layout = ParameterLayout.from_module(model)
        parameters = zip(self.layout.names, self.layout.parameters_of(model), strict=True)
        self._matrices = {name: f"step{i}" for i, (name, p) in enumerate(parameters) if p.ndim > 1}
        if not self._matrices:
            raise ShapeError("The network must have a weight of two or more axes; got none.")
        for name, parameter in zip(self.layout.names, self.layout.parameters_of(model), strict=True):
            if name in self._matrices:
                self.register_buffer(self._matrices[name], uniform_step(parameter, bits))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with rounded weights.

        Args:
            *args: As the network takes them.
            **kwargs: As the network takes them.

        Returns:
            What the network returns.
        """
        with callers_precision():
            return self._substitution(self._rounded(), lambda: self.model(*args, **kwargs))

    def _rounded(self) -> dict[str, Tensor]:
        """The weight matrices on their levels, with the gradients of the matrices themselves."""
        found = {}
        for name, parameter in zip(self.layout.names, self.layout.parameters_of(self.model), strict=True):
            if name in self._matrices:
                step = self.get_buffer(self._matrices[name])
                found[name] = parameter + (round_uniform(parameter, step, self.bits) - parameter).detach()
        return found

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Return the weights as the network uses them, shape ``(D,)``, in the order of the layout."""
        own = dict(zip(self.layout.names, self.layout.parameters_of(self.model), strict=True))
        levels = {
            name: round_uniform(own[name], self.get_buffer(buffer), self.bits)
            for name, buffer in self._matrices.items()
        }
        return self.layout.flatten({**own, **levels})
