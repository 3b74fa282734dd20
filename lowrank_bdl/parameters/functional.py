"""The network as a function f(θ, x) of its flat weight vector."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.precision import callers_precision
from lowrank_bdl.parameters.batches import CallFn, call_on_inputs, to_device
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.substitution import Substitution
from lowrank_bdl.parameters.wrappers import is_compiled, names_in, require_module, require_values


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put every submodule into evaluation mode for the length of a ``with`` block.

    The ``training`` flags are set one by one and set back one by one, so a partly frozen model gets its own mixture of
    modes back, also after an error; an overridden ``train()`` or ``eval()`` with side effects is not called.

    Args:
        model: The module.

    Yields:
        The same module.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
        >>> with evaluation_mode(net):
        ...     print(net[1].training)
        False
        >>> net[1].training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield model
    finally:
        for module, training in modes:
            module.training = training


def is_plain_perceptron(model: nn.Module) -> bool:
    """Whether every parameter belongs to a linear layer, and nothing watches or compiles what the network does.

    Such a network can be evaluated under several weight vectors at once, and a small one is faster for it.

    Args:
        model: Any module.

    Returns:
        True for linear layers among layers without parameters, hooks, or compilation.

    Example:
        >>> is_plain_perceptron(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), is_plain_perceptron(nn.BatchNorm1d(2))
        (True, False)
    """
    return not is_compiled(model) and all(
        not (m._forward_hooks or m._forward_pre_hooks)
        and (type(m) is nn.Linear or next(m.parameters(recurse=False), None) is None)
        for m in model.modules()
    )


class StatelessModel:
    """A module evaluated with named tensors in place of its own; what it owns stays as it is.

    Buffers are handed over as copies, so whatever a forward pass writes into them is dropped. So are weights and batch
    at the first call; what the network wrote into then (it normalised its input in place, or clamped a weight), at
    every call. Parts of the network under activation checkpointing see the same tensors in the backward pass.

    Args:
        model: Any module.
        call_fn: ``call_fn(model, batch)`` gives the output; it may call the model with several or with keyword
            arguments, or any method of it. None is `call_on_inputs`: ``model(x)``, or keyword arguments of a mapping.

    Attributes:
        model: The module.
        device: Where its first parameter (or buffer) lives; batches are moved there. None if it has neither.

    Example:
        >>> import torch
        >>> f = StatelessModel(nn.Linear(2, 1))
        >>> f({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, torch.ones(1, 2)).item()
        2.0
    """

    def __init__(self, model: nn.Module, call_fn: CallFn | None = None) -> None:
        require_module(model)
        require_values(model.named_parameters())
        self.model = model
        self.device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
        self._plain = {name: plain for plain, name in names_in(model).items()}
        self._call_fn = call_on_inputs if call_fn is None else call_fn
        self._substitution = Substitution(model)
        self._takes_derivatives = False  # inside its forward pass, as far as is known
        self._writes_inputs: bool | None = None  # None until the first call has shown it

    def __call__(
        self, parameters: Mapping[str, Tensor], batch: Any, buffers: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Evaluate the module.

        Args:
            parameters: Name to tensor, for any of the module's parameters; one name of a tied parameter is enough.
            batch: One batch; its tensors are moved to :attr:`device`.
            buffers: Name to value of buffers to override, for example recalibrated batch-norm statistics.

        Returns:
            What the model, or ``call_fn``, returns.

        Raises:
            ShapeError: If a buffer's name or shape is not the model's.
            LowRankBDLError: If the network computes with its own parameters in place of the given ones, or has a
                reentrant checkpoint, through which gradients do not reach these.
        """
        if torch.is_grad_enabled():
            return self._evaluate(parameters, batch, buffers)
        if not self._takes_derivatives:
            try:
                return self._evaluate(parameters, batch, buffers)
            except RuntimeError as error:
                if "does not require grad and does not have a grad_fn" not in str(error):
                    raise
                self._takes_derivatives = True  # forces, residuals of differential equations
        with torch.inference_mode(False), torch.enable_grad():
            output = self._evaluate(parameters, batch, buffers)
        return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)

    def _evaluate(self, parameters: Mapping[str, Tensor], batch: Any, buffers: Mapping[str, Tensor] | None) -> Any:
        named = nn.Module.named_buffers(self.model)
        present = {self._plain.get(name, name): buffer.detach().clone() for name, buffer in named}
        for name, value in (buffers or {}).items():
            own = present.get(name)
            if own is None or own.shape != value.shape:
                raise ShapeError(
                    f"Buffer {name!r} must have shape {None if own is None else tuple(own.shape)} as in the model; "
                    f"got {tuple(value.shape)}."
                )
            present[name] = value.to(own, copy=True)
        if self.device is not None:
            batch = to_device(batch, self.device)
        if self._writes_inputs is not False:
            batch = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        with callers_precision():
            output = self._substitution(parameters, lambda: self._call_fn(self.model, batch), present)
        if self._writes_inputs is None:  # tensors of inference mode do not count what is written
            leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
            self._writes_inputs = any(leaf.is_inference() or leaf._version > 0 for leaf in leaves)
        return output


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Cast and move a value to where a parameter is; keep the channels last where the parameter has them there.

    A network whose filters have them last runs in that order, which is faster, whatever the order of its inputs.
    """
    value = value.to(parameter)
    if parameter.ndim < 4 or parameter.is_contiguous() or not parameter.movedim(1, -1).is_contiguous():
        return value
    return value.movedim(1, -1).contiguous().movedim(-1, 1)  # contiguous(memory_format=...) is refused under vmap


class FunctionalModel:
    r"""The map :math:`(\theta, x) \mapsto f_\theta(x)`; the model's own weights and buffers stay as they are.

    Everything that θ does not cover (frozen parameters, buffers) is the model's own. Modes are the caller's business:
    see :func:`evaluation_mode`.

    Args:
        model: Any module.
        layout: What θ holds; None takes every trainable parameter.
        call_fn: As for :class:`StatelessModel`.

    Attributes:
        layout: What θ holds.
        stateless: The same network as a function of named tensors.

    Raises:
        ShapeError: If model and layout differ.

    Cost: a forward pass, plus O(P) and a copy of the buffers; θ is copied only where its dtype, device or memory format
    is not the parameter's.

    Example:
        >>> import torch
        >>> f = FunctionalModel(nn.Linear(2, 1))
        >>> f(torch.tensor([1.0, 2.0, 3.0]), torch.ones(1, 2)).item()
        6.0
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout | None = None, call_fn: CallFn | None = None) -> None:
        self.layout = ParameterLayout.from_module(model) if layout is None else layout
        self._parameters = self.layout.parameters_of(model)
        self.stateless = StatelessModel(model, call_fn)

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """Split θ into tensors of the model's present dtypes, devices and memory formats, differentiably.

        Args:
            theta: Shape ``(D,)``.

        Returns:
            Name to tensor; views, except where one has to be cast or filters have to get their channels last.

        Raises:
            ShapeError: If ``theta`` is not ``(D,)``.
        """
        if theta.shape != (self.layout.numel,):
            raise ShapeError(f"theta must have shape ({self.layout.numel},); got {tuple(theta.shape)}.")
        parts = self.layout.unflatten(theta)
        return {name: _like(parts[name], own) for name, own in zip(self.layout.names, self._parameters, strict=True)}

    def __call__(self, theta: Tensor, batch: Any, buffers: Mapping[str, Tensor] | None = None) -> Any:
        """Evaluate the network at θ.

        Args:
            theta: Shape ``(D,)``.
            batch: One batch; its tensors are moved to the model's device.
            buffers: Name to value of buffers to override.

        Returns:
            What the model, or ``call_fn``, returns.

        Raises:
            ShapeError: If ``theta`` is not ``(D,)``, or a buffer's name or shape is not the model's.
        """
        return self.stateless(self.named(theta), batch, buffers)
