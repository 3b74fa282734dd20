r"""Learning-rate schedules in closed form, as torch schedulers.

Each rate is a function of the number of steps taken and of each parameter group's initial rate alone, so a scheduler's
state is a few numbers and a resumed run goes on with the same rates. Torch's own schedulers (``SWALR``,
``SequentialLR``, ...) work in the same places.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class ClosedFormLR(LRScheduler, ABC):
    """A schedule given by ``rate(step, base_lr)``; a subclass defines only that.

    Args:
        optimizer: Its groups' learning rates are the base rates.
        last_epoch: Steps taken so far, -1 for a new run; see torch's ``LRScheduler``.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        super().__init__(optimizer, last_epoch)

    @abstractmethod
    def rate(self, step: int, base_lr: float) -> float:
        """Return the learning rate after ``step`` steps of a group that began with ``base_lr``."""

    def get_lr(self) -> "list[float | Tensor]":
        """Return the learning rate of each parameter group after ``last_epoch`` steps."""
        return [self.rate(self.last_epoch, float(base_lr)) for base_lr in self.base_lrs]


class SWAGLR(ClosedFormLR):
    r"""Flat for half of ``horizon``, linear down to ``swa_lr`` at 90 % of it, then flat.

    With :math:`t = \mathrm{epoch} / \mathrm{horizon}` and :math:`p = \min(\max((t - 0.5) / 0.4, 0), 1)`,

    .. math:: \mathrm{lr} = \mathrm{lr}_0 + p \, (\mathrm{lr}_{\mathrm{swa}} - \mathrm{lr}_0).

    The horizon is the epoch at which the collection of weights starts; or the length of the training when nothing is
    collected, with 1 % of the initial rate as ``swa_lr``.

    Args:
        optimizer: Its groups' learning rates are the initial rates.
        swa_lr: Rate from 90 % of the horizon on, >= 0.
        horizon: In steps of this scheduler (epochs, as published), >= 0; 0 gives ``swa_lr`` throughout.
        last_epoch: See torch's ``LRScheduler``.

    Raises:
        ValueError: If ``swa_lr`` or ``horizon`` is out of range.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (UAI 2018), appendix;
    Maddox et al. (NeurIPS 2019), appendix.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> schedule = SWAGLR(optimizer, swa_lr=0.02, horizon=10)
        >>> [round(schedule.rate(epoch, 0.1), 3) for epoch in (0, 5, 7, 9, 20)]
        [0.1, 0.1, 0.06, 0.02, 0.02]
    """

    def __init__(self, optimizer: Optimizer, swa_lr: float, horizon: int, last_epoch: int = -1) -> None:
        _require("swa_lr", swa_lr, 0)
        _require("horizon", horizon, 0)
        self.swa_lr, self.horizon = swa_lr, horizon
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int, base_lr: float) -> float:
        """Return the rate in epoch ``step`` (from 0)."""
        t = step / self.horizon if self.horizon else 1.0
        progress = min(max((t - 0.5) / 0.4, 0.0), 1.0)
        return (1 - progress) * base_lr + progress * self.swa_lr  # exact at both ends


class StepDecayLR(ClosedFormLR):
    r"""Multiply the rate by ``gamma`` after every so many epochs; hold it at ``swa_lr`` from ``swa_start`` on.

    .. math:: \mathrm{lr} = \mathrm{lr}_0 \, \gamma^{\lfloor \mathrm{epoch} / \mathrm{every} \rfloor}

    Args:
        optimizer: Its groups' learning rates are the initial rates.
        every: Epochs between two decays, >= 1.
        gamma: Factor of one decay, > 0.
        swa_start: First epoch (from 0) with ``swa_lr``; None for never.
        swa_lr: Rate from then on.
        last_epoch: See torch's ``LRScheduler``.

    Raises:
        ValueError: If an argument is out of range, or only one of ``swa_start`` and ``swa_lr`` is given.

    Source: Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 5.1; with SWA: Maddox et al. (2019), ImageNet.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = StepDecayLR(optimizer, every=30, swa_start=65, swa_lr=0.5)
        >>> [schedule.rate(epoch, 1.0) for epoch in (29, 30, 64, 65)]
        [1.0, 0.1, 0.010000000000000002, 0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int = 30,
        gamma: float = 0.1,
        swa_start: int | None = None,
        swa_lr: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        _require("every", every, 1)
        _require("gamma", gamma, 0, strictly=True)
        if (swa_start is None) != (swa_lr is None):
            raise ValueError(f"swa_start and swa_lr go together; got {swa_start} and {swa_lr}.")
        self.every, self.gamma, self.swa_start, self.swa_lr = every, gamma, swa_start, swa_lr
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int, base_lr: float) -> float:
        """Return the rate in epoch ``step`` (from 0)."""
        if self.swa_start is not None and self.swa_lr is not None and step >= self.swa_start:
            return self.swa_lr
        return base_lr * self.gamma ** (step // self.every)


class TriangularLR(ClosedFormLR):
    r"""Go from the highest rate linearly to ``min_lr`` and back, once in a cycle; meant to step with every batch.

    With :math:`t = (\mathrm{step} \bmod \mathrm{cycle}) / \mathrm{cycle}` and :math:`d = |1 - 2t|`,

    .. math:: \mathrm{lr} = \mathrm{lr}_{\min} + d \, (\mathrm{lr}_{\max} - \mathrm{lr}_{\min}),

    which is lowest in the middle of each cycle: fast geometric ensembling collects there.

    Args:
        optimizer: Its groups are the ones scheduled.
        min_lr: Lowest rate, >= 0.
        cycle: Steps in a cycle, >= 1.
        max_lr: Highest rate; None for each group's initial rate.
        last_epoch: See torch's ``LRScheduler``.

    Raises:
        ValueError: If an argument is out of range.

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (NeurIPS 2018), section 4.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> schedule = TriangularLR(optimizer, min_lr=0.1, cycle=4)
        >>> [round(schedule.rate(step, 0.5), 3) for step in range(6)]
        [0.5, 0.3, 0.1, 0.3, 0.5, 0.3]
    """

    def __init__(
        self, optimizer: Optimizer, min_lr: float, cycle: int, max_lr: float | None = None, last_epoch: int = -1
    ) -> None:
        _require("min_lr", min_lr, 0)
        _require("cycle", cycle, 1)
        if max_lr is not None:
            _require("max_lr", max_lr, 0)
        self.min_lr, self.max_lr, self.cycle = min_lr, max_lr, cycle
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int, base_lr: float) -> float:
        """Return the rate of batch ``step`` (from 0)."""
        distance = abs(1 - 2 * (step % self.cycle) / self.cycle)
        highest = base_lr if self.max_lr is None else self.max_lr
        return self.min_lr + distance * (highest - self.min_lr)


class CosineLR(ClosedFormLR):
    r"""Half a cosine from the initial rate to ``final_lr``; from ``repeat_from`` on, its last piece again and again.

    .. math::
        \mathrm{lr} = \mathrm{lr}_{\mathrm{final}} + \tfrac12 (1 + \cos(\pi \, \mathrm{epoch} / \mathrm{horizon}))
                      \, (\mathrm{lr}_0 - \mathrm{lr}_{\mathrm{final}})

    Without ``repeat_from`` the rate stays at ``final_lr`` after the horizon. With it, the cosine is cut at that epoch
    and the c = horizon − repeat_from epochs before the cut repeat, so that weights can be averaged at their ends.

    Args:
        optimizer: Its groups' learning rates are the initial rates.
        horizon: Epochs of the half period, >= 1.
        final_lr: Rate at its end, >= 0.
        repeat_from: Epoch of the cut; at least half of the horizon and less than it. None for no cycles.
        last_epoch: See torch's ``LRScheduler``.

    Raises:
        ValueError: If an argument is out of range.

    Source: Loshchilov and Hutter, "SGDR" (2017), eq. 5; cycles: Athiwaratkun et al., "There Are Many Consistent
    Explanations of Unlabeled Data" (2019), section 4.1, whose run is horizon 210, repeat_from 180.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = CosineLR(optimizer, horizon=210, repeat_from=180)
        >>> schedule.rate(105, 1.0), schedule.rate(180, 1.0) == schedule.rate(150, 1.0)
        (0.5, True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        horizon: int,
        final_lr: float = 0.0,
        repeat_from: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        _require("horizon", horizon, 1)
        _require("final_lr", final_lr, 0)
        if repeat_from is not None and not horizon <= 2 * repeat_from < 2 * horizon:
            raise ValueError(
                f"repeat_from must be at least half of horizon = {horizon} and less than it; got {repeat_from}."
            )
        self.horizon, self.final_lr, self.repeat_from = horizon, final_lr, repeat_from
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int, base_lr: float) -> float:
        """Return the rate in epoch ``step`` (from 0)."""
        if self.repeat_from is not None and step >= self.repeat_from:
            piece = self.horizon - self.repeat_from
            step = self.repeat_from - piece + (step - self.repeat_from) % piece
        height = (1 + math.cos(math.pi * min(step, self.horizon) / self.horizon)) / 2
        return self.final_lr + height * (base_lr - self.final_lr)


class ThenLR(ClosedFormLR):
    """One schedule until a milestone, then another that begins there.

    Torch's ``SequentialLR`` does the same for schedules without a closed form.

    Args:
        optimizer: The optimizer of both.
        first: Schedule of the steps before the milestone.
        second: Schedule of those from the milestone on; its step 0 is the milestone.
        milestone: In steps, >= 0.
        last_epoch: See torch's ``LRScheduler``.

    Raises:
        ValueError: If ``milestone`` < 0.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
        >>> first = SWAGLR(optimizer, swa_lr=0.5, horizon=2)
        >>> schedule = ThenLR(optimizer, first, TriangularLR(optimizer, 0.1, cycle=4, max_lr=0.5), milestone=2)
        >>> [round(schedule.rate(step, 0.8), 3) for step in range(7)]
        [0.8, 0.8, 0.5, 0.3, 0.1, 0.3, 0.5]
    """

    def __init__(
        self, optimizer: Optimizer, first: ClosedFormLR, second: ClosedFormLR, milestone: int, last_epoch: int = -1
    ) -> None:
        _require("milestone", milestone, 0)
        self.first, self.second, self.milestone = first, second, milestone
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int, base_lr: float) -> float:
        """Return the rate of step ``step`` (from 0)."""
        if step < self.milestone:
            return self.first.rate(step, base_lr)
        return self.second.rate(step - self.milestone, base_lr)

    def state_dict(self) -> dict[str, Any]:
        """Return the state; the two schedules have none besides it."""
        return {key: value for key, value in super().state_dict().items() if key not in ("first", "second")}


def _require(name: str, value: float, least: float, *, strictly: bool = False) -> None:
    if not (value > least if strictly else value >= least) or value == math.inf:
        raise ValueError(f"{name} must be {'more than' if strictly else 'at least'} {least} and finite; got {value}.")
