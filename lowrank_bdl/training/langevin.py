r"""Sampling by training: optimizers for SGD's mean loss, whose iterates are draws from a tempered posterior.

With :math:`U(\theta) = \ell(\theta) + \tfrac{\lambda}{2} \lVert\theta\rVert^2`, the mean loss over N examples and
weight decay λ, both have the stationary density

.. math:: p(\theta) \propto \exp\bigl(-\tfrac{N}{T} U(\theta)\bigr)

up to the step's discretisation and the noise of mini-batches, both O(lr). For a mean negative log-likelihood and T = 1
that is the posterior under the prior N(0, I / (N λ)).
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_bdl.linalg.devices import generator_on
from lowrank_bdl.training.checked_optimizer import SGD_BOUNDS, Bound, CheckedOptimizer


class _Langevin(CheckedOptimizer):
    """What both share: noise of the variance that a step and its friction need."""

    bounds: ClassVar[dict[str, Bound]] = {
        **SGD_BOUNDS,
        "num_data": (lambda value: 1 <= value < math.inf, "at least 1"),
        "temperature": (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    }

    def _add_noise_(self, target: Tensor, group: dict[str, Any], friction: float) -> None:
        """Add normals of variance 2 · friction · lr · T / N."""
        variance = 2 * friction * float(group["lr"]) * group["temperature"] / group["num_data"]
        if variance:
            noise = torch.empty_like(target).normal_(generator=generator_on(target.device, self.generator))
            target.add_(noise, alpha=math.sqrt(variance))


class SGLD(_Langevin):
    r"""Stochastic gradient Langevin dynamics for a mean loss.

    .. math:: \theta \leftarrow \theta - \eta \, (g + \lambda \theta) + \sqrt{2 \eta T / N} \; \xi,
        \qquad \xi \sim N(0, I)

    where g is the gradient of the mean loss. In the notation of the paper, which sums over the data, its step size is
    :math:`\epsilon = 2 \eta / N` at T = 1.

    Args:
        params: Parameters, or groups of them with values of their own.
        lr: Step size η >= 0 [parameter² / nat of the mean loss]; a schedule may lower it, the noise follows.
        num_data: N >= 1, the number of training examples behind the mean loss.
        temperature: T >= 0; 1 is the posterior, 0 plain gradient descent, N a chain without the factor 1 / N.
        weight_decay: λ >= 0, the precision of the Gaussian prior over N.
        generator: Source of the noise, on any device; None takes torch's default generator, whose state a
            :class:`~lowrank_bdl.training.trainer.Trainer` keeps in its checkpoints.

    Raises:
        ValueError: If a value is out of range.

    Cost: one normal a parameter and step; no state.

    Source: Welling and Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics" (ICML 2011), eq. 4.

    Example:
        >>> theta = torch.zeros(10_000, requires_grad=True)  # as many chains, for the loss theta² / 2 of 50 examples
        >>> chain = SGLD([theta], lr=0.1, num_data=50, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(60):
        ...     chain.zero_grad()
        ...     (theta.square().sum() / 2).backward()
        ...     chain.step()
        >>> exact = 1 / 50 / (1 - 0.1 / 2)  # of the discrete chain; 1 / 50 as lr goes to 0
        >>> abs(theta.var().item() / exact - 1) < 0.05
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = dict(lr=lr, num_data=num_data, temperature=temperature, weight_decay=weight_decay)
        super().__init__(params, defaults, generator)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        parameter.add_(gradient, alpha=-float(group["lr"]))
        self._add_noise_(parameter, group, friction=1.0)


class SGHMC(_Langevin):
    r"""Stochastic gradient Hamiltonian Monte Carlo for a mean loss: SGD with momentum and the noise its friction needs.

    .. math::
        v \leftarrow \beta v - \eta \, (g + \lambda \theta) + \sqrt{2 (1 - \beta) \eta T / N} \; \xi,
        \qquad \theta \leftarrow \theta + v

    Momentum 0 is :class:`SGLD`. η and β are what SGD's learning rate and momentum are.

    Args:
        params: Parameters, or groups of them with values of their own.
        lr: Step size η >= 0 [parameter² / nat of the mean loss]; a schedule may lower it, the noise follows.
        num_data: N >= 1, the number of training examples behind the mean loss.
        momentum: β in [0, 1); 1 − β is the friction.
        temperature: T >= 0; 1 is the posterior, 0 SGD with momentum.
        weight_decay: λ >= 0, the precision of the Gaussian prior over N.
        generator: As in :class:`SGLD`.

    Raises:
        ValueError: If a value is out of range.

    Cost: one normal a parameter and step, and one velocity a parameter.

    Source: Chen, Fox and Guestrin, "Stochastic Gradient Hamiltonian Monte Carlo" (ICML 2014), eq. 15 with
    :math:`\alpha = 1 - \beta`, its step size :math:`\eta T / N`, and no estimate of the gradient's noise.

    Example:
        >>> theta = torch.zeros(10_000, requires_grad=True)
        >>> chain = SGHMC([theta], lr=0.01, num_data=50, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(150):
        ...     chain.zero_grad()
        ...     (theta.square().sum() / 2).backward()
        ...     chain.step()
        >>> abs(50 * theta.var().item() - 1) < 0.1
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int,
        momentum: float = 0.9,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = dict(lr=lr, num_data=num_data, momentum=momentum, temperature=temperature, weight_decay=weight_decay)
        super().__init__(params, defaults, generator)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: Tensor = state["velocity"]
        velocity.mul_(group["momentum"]).add_(gradient, alpha=-float(group["lr"]))
        self._add_noise_(velocity, group, friction=1.0 - group["momentum"])
        parameter.add_(velocity)
