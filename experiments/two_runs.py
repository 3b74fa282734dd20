"""Two runs that share their first part: one whose rate decays, one at a constant rate whose weights are averaged."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from experiments.study_methods import go_on_from
from lowrank_bdl.training import schedules
from lowrank_bdl.training.trainer import Data, Record, Trainer


def rate_schedule(settings: Any, optimizer: torch.optim.Optimizer, *, average: bool) -> schedules.ClosedFormLR:
    """Return the schedule of one of the two runs; both have the first rate until they part.

    Args:
        settings: Has ``epochs``, ``swa_start`` (the epoch after which the runs part), ``lr_init`` and ``swa_lr``.
        optimizer: Of the run.
        average: Whether it is the one at the constant rate ``swa_lr``; the other's decays to 1 % from the same epoch.
    """
    if average:
        no_decay = settings.epochs + 1
        return schedules.StepDecayLR(optimizer, every=no_decay, swa_start=settings.swa_start, swa_lr=settings.swa_lr)
    left = settings.epochs - settings.swa_start
    return schedules.ThenLR(
        optimizer,
        schedules.StepDecayLR(optimizer, every=settings.epochs + 1),
        schedules.CosineLR(optimizer, horizon=left, final_lr=0.01 * settings.lr_init),
        milestone=settings.swa_start,
    )


def train_two(
    make: Callable[[bool], Trainer],
    data: Data,
    settings: Any,
    description: str,
    after_epoch: Callable[[Trainer, Record], None] | None = None,
) -> tuple[Trainer, Trainer]:
    """Train the run whose rate decays, and from its epoch ``swa_start`` on the one that is averaged.

    Args:
        make: ``make(average)`` makes a run; both with the same initial weights and seed.
        data: As `Trainer.fit` takes it.
        settings: Has ``epochs`` and ``swa_start``.
        description: Of the progress bar.
        after_epoch: Called after every epoch of both.

    Returns:
        The decayed and the averaged run.
    """
    decayed = make(False)
    total = 2 * settings.epochs - settings.swa_start
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs a line now and then, not a moving bar
    with tqdm(total=total, desc=description, unit="epoch", leave=False, mininterval=interval) as bar:

        def tell(trainer: Trainer, record: Record) -> None:
            bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.3g}", refresh=False)
            bar.update()
            if after_epoch is not None:
                after_epoch(trainer, record)

        decayed.fit(data, settings.swa_start, after_epoch=tell, progress=False)
        middle = copy.deepcopy(decayed.state_dict())
        decayed.fit(data, settings.epochs, after_epoch=tell, progress=False)
        averaged = make(True)
        go_on_from(averaged, middle)
        averaged.fit(data, settings.epochs, after_epoch=tell, progress=False)
    return decayed, averaged
