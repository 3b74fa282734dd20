"""Running averages of weights, as torch's ``AveragedModel`` with the right averaging function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lowrank_bdl.parameters.layout import ParameterLayout

AveragingFunction = Callable[[Tensor, Tensor, "Tensor | int"], Tensor]
"""``avg_fn(average, current, num_averaged)``: the new average of one parameter."""


def swa(model: nn.Module) -> AveragedModel:
    r"""Return an equal average, :math:`\bar\theta_n = \bar\theta_{n-1} + (\theta_n - \bar\theta_{n-1}) / n`.

    Args:
        model: Copied, not changed; its current weights are not counted.

    Source: Izmailov et al. (UAI 2018), algorithm 1. :class:`~lowrank_bdl.posteriors.swag.SWAG` keeps the same mean.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> average = swa(net)
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(net.weight, value)
        ...     average.update_parameters(net)
        >>> weights(average).item()
        3.0
    """
    return AveragedModel(model)


def polyak(model: nn.Module) -> AveragedModel:
    """Return the average of Polyak and Ruppert: equal weights, as in :func:`swa`, but to be updated after every step.

    Args:
        model: Copied, not changed.

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992).

    Example:
        >>> int(polyak(nn.Linear(1, 1)).n_averaged)
        0
    """
    return AveragedModel(model)


def ema(model: nn.Module, decay: float = 0.999, warmup: bool = False) -> AveragedModel:
    r"""Return an exponential average, :math:`\bar\theta_n = \beta \bar\theta_{n-1} + (1 - \beta) \theta_n`.

    Args:
        model: Copied, not changed; the first update sets the average to the weights it sees.
        decay: β in [0, 1).
        warmup: Use min(1 − 1/(n + 1), β) for the n-th update after the first, so that early iterates are forgotten.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).

    Source: Tarvainen and Valpola, "Mean teachers are better role models" (2017), with the warm-up of its code.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> average = ema(net, decay=0.5)
        >>> for value in (1.0, 2.0, 4.0):
        ...     _ = nn.init.constant_(net.weight, value)
        ...     average.update_parameters(net)
        >>> weights(average).item()
        2.75
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1); got {decay}.")
    if not warmup:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def average(old: Tensor, new: Tensor, num_averaged: "Tensor | int") -> Tensor:
        keep = 1 - 1 / (torch.as_tensor(num_averaged, device=old.device) + 1.0)
        return torch.lerp(new, old, keep.clamp(max=decay).to(old.dtype))

    return AveragedModel(model, avg_fn=average)


def custom(model: nn.Module, avg_fn: AveragingFunction) -> AveragedModel:
    """Return an average with a function of your own.

    Args:
        model: Copied, not changed; the first update sets the average to the weights it sees.
        avg_fn: ``avg_fn(average, current, num_averaged)`` of one parameter, called from the second update on. Resume
            is exact if it keeps no state of its own.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> largest = custom(net, lambda average, current, num_averaged: torch.maximum(average, current))
        >>> for value in (1.0, 5.0, 2.0):
        ...     _ = nn.init.constant_(net.weight, value)
        ...     largest.update_parameters(net)
        >>> weights(largest).item()
        5.0
    """
    return AveragedModel(model, avg_fn=avg_fn)


def weights(averaged: AveragedModel, layout: ParameterLayout | None = None) -> Tensor:
    """Return the averaged weights as one new vector ``(D,)``, as :func:`lowrank_bdl.predict` takes them.

    Args:
        averaged: The average.
        layout: What the vector holds; None takes every trainable parameter.

    Raises:
        ValueError: Before the first update, when it holds initial weights.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> average = swa(net)
        >>> average.update_parameters(net)
        >>> torch.equal(weights(average), torch.cat([p.detach().flatten() for p in net.parameters()]))
        True
    """
    if int(averaged.n_averaged) == 0:
        raise ValueError("the average needs at least 1 update; got 0. Call update_parameters(model) first.")
    layout = ParameterLayout.from_module(averaged.module) if layout is None else layout
    return layout.flatten(averaged.module)
