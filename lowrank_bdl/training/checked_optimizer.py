"""What this library's optimizers share."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

Bound: TypeAlias = "tuple[Callable[[Any], bool], str]"

SGD_BOUNDS: dict[str, Bound] = {
    "lr": (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    "momentum": (lambda value: 0 <= value < 1, "in [0, 1)"),
}
"""Of what every kind of stochastic gradient descent has."""


class CheckedOptimizer(Optimizer):
    """An optimizer with checked groups, weight decay in the gradient, and a generator that is part of its state.

    A subclass says how a parameter moves, and what its settings may be.

    Args:
        params: Parameters, or groups of them with values of their own.
        defaults: Settings of groups that do not say otherwise, ``weight_decay`` among them.
        generator: Source of what is random, on any device; None takes torch's default generator.

    Attributes:
        generator: As given.
        bounds: Setting to a test of its value and the words that say it.

    Raises:
        ValueError: If a setting is out of range.
    """

    bounds: ClassVar[dict[str, Bound]] = SGD_BOUNDS

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], generator: torch.Generator | None) -> None:
        self.generator = generator
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with values of their own, checked as those of the constructor are.

        Args:
            param_group: ``{"params": ..., "lr": ..., ...}``.

        Raises:
            ValueError: Names what is out of range.
        """
        for name in self.defaults:
            value = param_group.get(name, self.defaults[name])
            inside, words = self.bounds[name]
            if not inside(value):
                raise ValueError(f"{name} must be {words}; got {value}.")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient stay where they are.

        Args:
            closure: Evaluates the loss anew and returns it.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            TypeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise TypeError(f"{type(self).__name__} needs dense gradients; got a sparse one.")
                decay = group["weight_decay"]
                gradient = parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad
                self._move(parameter, gradient, group)
        return loss

    @abstractmethod
    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take the step of one parameter, in place.

        Args:
            parameter: The parameter.
            gradient: Of its shape, weight decay included; may be its ``grad`` itself.
            group: The settings.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state, that of the generator included, so that a resumed chain draws what the whole one drew."""
        state = super().state_dict()
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the groups differ, or one of the two has a generator of its own and the other has not.
        """
        if ("generator" in state_dict) != (self.generator is not None):
            having = ("the state", "the optimizer") if self.generator is None else ("the optimizer", "the state")
            raise ValueError(f"{having[0]} has a generator of its own and {having[1]} has not.")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "generator"})
        if self.generator is not None:
            self.generator.set_state(state_dict["generator"].to("cpu"))  # where states live, whatever the device
