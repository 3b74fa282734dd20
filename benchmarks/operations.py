"""Every operation of the suite: who competes, what a right answer is, and which bytes and normals it cannot avoid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Check, Contender
from benchmarks.problems import CollectProblem, GaussianProblem, Size


@dataclass(frozen=True)
class Operation:
    """A row group of the suite.

    Attributes:
        name: Key, also on the command line and, where there is one, of `lowrank_bdl.estimate_memory`.
        title: For tables and plots.
        contenders: Competitors and floors for a size.
        check: Judges an answer.
        result_bytes: Size of the answer, which no implementation can do without.
        traffic: Numbers that must be read or written, and normals that must be drawn: ``(numbers, normals)``.
        problem: `GaussianProblem` or `CollectProblem`.
        sweep: Whether it is measured over all ranks; the others at one rank.
        min_rank: Smallest rank at which it means something.
        max_numel: Largest D at which it is measured, for those that wait for a disk.
        heavy: Contenders measured at the main rank only, since they take tens of seconds.
        estimate: Operation name and options of `estimate_memory`.
    """

    name: str
    title: str
    contenders: Callable[[Size], Sequence[Contender]]
    check: Callable[[Any, Any], Check]
    result_bytes: Callable[[Size], int]
    traffic: Callable[[Size], tuple[float, float]]
    problem: type[GaussianProblem] | type[CollectProblem] = GaussianProblem
    sweep: bool = False
    min_rank: int = 1
    max_numel: int | None = None
    heavy: tuple[str, ...] = ()
    estimate: Callable[[Size], dict[str, Any]] | None = None


def operations() -> dict[str, Operation]:
    """Return all operations by name, in the order in which they are run."""
    from benchmarks import collect_operations, density_operations, draw_operations, structure_operations

    parts = (draw_operations, density_operations, structure_operations, collect_operations)
    return {op.name: op for part in parts for op in part.OPERATIONS}


def components(size: Size) -> int:
    """Return how many principal components are asked for at a size: 5, or all where the rank is smaller."""
    return min(5, size.rank)


def fresh(size: Size, *, factor: float = 1.0, root: float = 0.0) -> int:
    """Return bytes of ``factor`` D-vectors and ``root`` D x K tensors."""
    return int((factor * size.numel + root * size.numel * size.rank) * size.itemsize)
