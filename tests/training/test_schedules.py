"""Schedules: their formulas, their state, and torch's own in the same places."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR
from torch.optim.swa_utils import SWALR

from lowrank_bdl.training.schedules import SWAGLR, ClosedFormLR, CosineLR, StepDecayLR, ThenLR, TriangularLR

MAKERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "swag": lambda o: SWAGLR(o, swa_lr=0.02, horizon=6),
    "step": lambda o: StepDecayLR(o, every=3, gamma=0.5, swa_start=7, swa_lr=0.03),
    "triangular": lambda o: TriangularLR(o, min_lr=0.01, cycle=4),
    "cosine": lambda o: CosineLR(o, horizon=8, repeat_from=6),
    "then": lambda o: ThenLR(o, SWAGLR(o, 0.05, 3), TriangularLR(o, 0.01, 4, max_lr=0.05), milestone=3),
    "swalr": lambda o: SequentialLR(o, [SWAGLR(o, 0.05, 4), SWALR(o, 0.02, anneal_epochs=3)], milestones=[4]),
}


def optimizer(*rates: float) -> Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates(opt: Optimizer, schedule: LRScheduler, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in opt.param_groups])
        opt.step()
        schedule.step()
    return found


def test_swag_is_flat_then_linear_then_flat() -> None:
    opt = optimizer(0.1, 1.0)
    found = rates(opt, SWAGLR(opt, swa_lr=0.01, horizon=100), 120)
    for epoch, pair in enumerate(found):
        t = epoch / 100
        for lr, base in zip(pair, (0.1, 1.0), strict=True):
            # the published form: a factor that goes from 1 to the ratio of the two rates
            ratio = 0.01 / base
            factor = 1.0 if t <= 0.5 else 1 - (1 - ratio) * (t - 0.5) / 0.4 if t <= 0.9 else ratio
            assert lr == pytest.approx(base * factor, rel=1e-12)
    opt = optimizer(0.1)
    assert rates(opt, SWAGLR(opt, swa_lr=0.01, horizon=0), 2) == [[0.01], [0.01]]


def test_step_decay_then_the_swa_rate() -> None:
    opt = optimizer(0.8)
    found = [lr for (lr,) in rates(opt, StepDecayLR(opt, every=3, gamma=0.5, swa_start=7, swa_lr=0.3), 9)]
    assert found == [0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2, 0.3, 0.3]


def test_triangles_are_lowest_in_the_middle_of_a_cycle() -> None:
    opt = optimizer(0.5)
    schedule = TriangularLR(opt, min_lr=0.1, cycle=6)
    found = [lr for (lr,) in rates(opt, schedule, 13)]
    for step, lr in enumerate(found):
        t = step % 6 / 6
        # fast geometric ensembling: alpha_1 to alpha_2 in the first half, and back in the second
        expected = (1 - 2 * t) * 0.5 + 2 * t * 0.1 if t <= 0.5 else (2 - 2 * t) * 0.1 + (2 * t - 1) * 0.5
        assert lr == pytest.approx(expected, rel=1e-12)
    assert found.index(min(found)) == 3


def test_cosine_stays_at_its_end_or_repeats_its_last_piece() -> None:
    opt = optimizer(1.0)
    found = [lr for (lr,) in rates(opt, CosineLR(opt, horizon=10, final_lr=0.2), 14)]
    assert found[:11] == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * e / 10)) for e in range(11)], rel=1e-12)
    assert found[10:] == pytest.approx([0.2] * 4, rel=1e-12)
    opt = optimizer(1.0)
    schedule = CosineLR(opt, horizon=210, repeat_from=180)
    assert [schedule.rate(e, 1.0) for e in range(180, 240)] == 2 * [schedule.rate(e, 1.0) for e in range(150, 180)]
    assert schedule.rate(150, 1.0) == pytest.approx(0.188, abs=5e-4)  # the factors of the fast-SWA runs
    assert schedule.rate(179, 1.0) == pytest.approx(0.053, abs=5e-4)


def test_one_schedule_then_another() -> None:
    opt = optimizer(0.8)
    second = TriangularLR(opt, min_lr=0.1, cycle=4, max_lr=0.5)
    found = [lr for (lr,) in rates(opt, ThenLR(opt, SWAGLR(opt, 0.5, horizon=2), second, milestone=2), 8)]
    assert found == pytest.approx([0.8, 0.8, 0.5, 0.3, 0.1, 0.3, 0.5, 0.3], rel=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_goes_on_where_it_was_taken(name: str) -> None:
    opt = optimizer(0.1, 0.4)
    whole = rates(opt, MAKERS[name](opt), 14)
    for split in (0, 1, 4, 9):
        first = optimizer(0.1, 0.4)
        schedule = MAKERS[name](first)
        before = rates(first, schedule, split)
        second = optimizer(0.1, 0.4)
        again = MAKERS[name](second)
        second.load_state_dict(first.state_dict())
        again.load_state_dict(schedule.state_dict())
        assert before + rates(second, again, 14 - split) == whole


def test_swalr_takes_over() -> None:
    opt = optimizer(0.1)
    found = [lr for (lr,) in rates(opt, MAKERS["swalr"](opt), 12)]
    assert found[:3] == pytest.approx([0.1, 0.1, 0.1], rel=1e-12) and found[3] == pytest.approx(0.06875, rel=1e-9)
    assert found[-1] == pytest.approx(0.02, rel=1e-9)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda o: SWAGLR(o, swa_lr=-0.1, horizon=3), "swa_lr must be at least 0 and finite; got -0.1"),
        (lambda o: SWAGLR(o, swa_lr=float("nan"), horizon=3), "swa_lr must be at least 0 and finite; got nan"),
        (lambda o: SWAGLR(o, swa_lr=0.1, horizon=-1), "horizon must be at least 0 and finite; got -1"),
        (lambda o: StepDecayLR(o, every=0), "every must be at least 1 and finite; got 0"),
        (lambda o: StepDecayLR(o, gamma=0), "gamma must be more than 0 and finite; got 0"),
        (lambda o: StepDecayLR(o, swa_start=3), "swa_start and swa_lr go together; got 3 and None"),
        (lambda o: TriangularLR(o, 0.1, cycle=0), "cycle must be at least 1 and finite; got 0"),
        (lambda o: TriangularLR(o, 0.1, 2, max_lr=float("inf")), "max_lr must be at least 0 and finite; got inf"),
        (lambda o: CosineLR(o, horizon=0), "horizon must be at least 1 and finite; got 0"),
        (lambda o: CosineLR(o, horizon=10, repeat_from=4), "at least half of horizon = 10 and less than it; got 4"),
        (lambda o: CosineLR(o, horizon=10, repeat_from=10), "at least half of horizon = 10 and less than it; got 10"),
    ],
)
def test_what_makes_no_schedule_is_refused(make: Callable[[Optimizer], ClosedFormLR], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optimizer(0.1))
