"""Collecting iterates, and the state that a collector keeps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from benchmarks import peers
from benchmarks.hand_written import FlatCollector, PerTensorCollector
from benchmarks.harness import Call, Check, Contender
from benchmarks.operations import Operation
from benchmarks.problems import CollectProblem, Size

FLATTEN_AND_COPY = "floor: flatten, and a copy that moves 7 D"
TOUCH = "floor: touch the bytes"


def _collector(
    make: Callable[[CollectProblem], Any],
    update: Callable[[Any, CollectProblem], None],
    read: Callable[[Any, CollectProblem], tuple[Tensor, Tensor | None, Tensor | None]],
) -> Callable[[CollectProblem], Call]:
    """Prepare one update of a collector that has seen more iterates than it keeps; the first call is not one.

    The collector is filled while it is prepared, and checked by what it holds after the last of the known iterates,
    which the first call counts.
    """

    def prepare(problem: CollectProblem) -> Call:
        collector = make(problem)
        last = problem.num_snapshots - 1
        for step in problem.snapshots():
            if step < last:
                update(collector, problem)

        def call() -> Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]:
            update(collector, problem)
            return lambda: read(collector, problem)

        return call

    return prepare


def _collect(size: Size) -> Sequence[Contender]:
    def ours_make(problem: CollectProblem) -> Any:
        from lowrank_bdl.posteriors.swag import SWAG

        return SWAG(problem.model, rank=size.rank)

    def ours_read(swag: Any, p: CollectProblem) -> tuple[Tensor, Tensor | None, Tensor | None]:
        newest = swag.storage[(int(swag.num_pushed) - 1) % size.rank]
        return tuple(p.subset_of_flat(t) for t in (swag.mean, swag.variance, newest))  # type: ignore[return-value]

    def flat_read(c: Any, p: CollectProblem) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return p.subset_of_flat(c.mean), p.subset_of_flat(c.variance), p.subset_of_flat(c.newest)

    def averaged_read(c: AveragedModel, p: CollectProblem) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return p.subset(list(c.module.parameters())), None, None

    def floor(problem: CollectProblem) -> Call:
        numel = sum(p.numel() for p in problem.parameters)
        source = torch.ones(7 * numel // 2, dtype=problem.dtype, device=problem.device)
        target = torch.zeros_like(source)

        def call() -> Tensor:
            flat = torch.cat([p.detach().reshape(-1) for p in problem.parameters])
            target.copy_(source)
            return flat

        return call

    return (
        Contender(peers.OURS, _collector(ours_make, lambda c, p: c.update_parameters(p.model), ours_read)),
        Contender(
            peers.HAND,
            _collector(
                lambda p: FlatCollector(sum(t.numel() for t in p.parameters), size.rank, p.dtype, p.device),
                lambda c, p: c.update(p.parameters),
                flat_read,
            ),
        ),
        Contender(
            peers.RELEASED,
            _collector(
                lambda p: PerTensorCollector(p.parameters, size.rank), lambda c, p: c.update(p.parameters), flat_read
            ),
            note="E[x²], deviations grown by torch.cat",
        ),
        Contender(
            peers.AVERAGED,
            _collector(lambda p: AveragedModel(p.model), lambda c, p: c.update_parameters(p.model), averaged_read),
            note="the mean only",
        ),
        Contender(FLATTEN_AND_COPY, floor, floor=True),
    )


def _collect_check(problem: CollectProblem, answer: Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]) -> Check:
    errors = {}
    for name, found, exact in zip(("mean", "variance", "deviation"), answer(), problem.expected, strict=True):
        if found is not None:
            errors[name] = (float((found - exact).norm() / exact.norm()), 1e-5 if name == "mean" else 1e-2)
    return Check.of(**errors)


def _state(size: Size) -> Sequence[Contender]:
    def ours(problem: CollectProblem) -> Call:
        from lowrank_bdl.posteriors.swag import SWAG

        def call() -> list[Tensor]:
            buffers = list(SWAG(problem.model, rank=size.rank).buffers())
            for buffer in buffers:
                buffer.fill_(1)  # zeros are not resident before they are touched
            return buffers

        return call

    def floor(problem: CollectProblem) -> Call:
        shape = size.rank + 3, sum(p.numel() for p in problem.parameters)
        return lambda: torch.empty(shape, dtype=problem.dtype, device=problem.device).fill_(1)

    return (Contender(peers.OURS, ours), Contender(TOUCH, floor, floor=True))


def _state_check(problem: CollectProblem, buffers: list[Tensor]) -> Check:
    expected = (problem.size.rank + 3) * sum(p.numel() for p in problem.parameters) * problem.size.itemsize
    return Check.of(bytes_off=(sum(b.nbytes for b in buffers) / expected - 1, 0.02))


OPERATIONS = (
    Operation(
        name="collect",
        title="collect one iterate",
        contenders=_collect,
        check=_collect_check,
        result_bytes=lambda size: 0,
        traffic=lambda size: (9 * size.numel, 0),
        problem=CollectProblem,
        heavy=(),
        estimate=lambda size: {"operation": "collect"},
    ),
    Operation(
        name="state",
        title="stored state of a collector",
        contenders=_state,
        check=_state_check,
        result_bytes=lambda size: (size.rank + 3) * size.numel * size.itemsize,
        traffic=lambda size: ((size.rank + 3) * size.numel, 0),
        problem=CollectProblem,
        sweep=True,
        estimate=lambda size: {"operation": "state"},
    ),
)
