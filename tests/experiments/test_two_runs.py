"""Two runs that share their first part: rates, what they share, and where they part."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.two_runs import rate_schedule, train_two
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Record, Trainer


@dataclass(frozen=True)
class Recipe:
    """Of both runs."""

    epochs: int = 8
    swa_start: int = 4
    lr_init: float = 0.2
    swa_lr: float = 0.1


def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    return [(x[rows], (x[rows, 0] > 0).long()) for rows in torch.randperm(32, generator=generator).split(8)]


def make(average: bool) -> Trainer:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = rate_schedule(Recipe(), optimizer, average=average)
    collections = {"swag": Collection(lb.SWAG(model, rank=2), start=4)} if average else {}
    return Trainer(model, optimizer, schedule=schedule, collections=collections, seed=3)


def test_the_first_part_is_shared_and_the_second_is_not() -> None:
    seen: list[int] = []

    def follow(trainer: Trainer, record: Record) -> None:
        seen.append(trainer.epoch)

    decayed, averaged = train_two(make, batches, Recipe(), "two", follow)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]

    def rates(trainer: Trainer) -> list[Any]:
        return [record["lr"] for record in trainer.history]

    assert rates(averaged) == pytest.approx([0.2] * 4 + [0.1] * 4)
    assert rates(decayed)[:5] == pytest.approx([0.2] * 5)
    assert rates(decayed) == sorted(rates(decayed), reverse=True) and 0.002 < rates(decayed)[-1] < 0.05
    assert averaged.history[:4] == decayed.history[:4] and averaged.history[4] != decayed.history[4]
    swag = averaged.collections["swag"].collector
    assert isinstance(swag, lb.SWAG) and swag.n_averaged == 4


def test_the_averaged_run_is_the_one_that_would_have_been_trained_alone() -> None:
    """From the branch on it has the momentum, the order of the data and the dropout of a run that never parted."""
    _, averaged = train_two(make, batches, Recipe(), "two")
    alone = make(True)
    alone.fit(batches, 8, progress=False)
    for one, other in zip(averaged.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert averaged.history == alone.history
