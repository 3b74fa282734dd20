"""Draws, diagonal and principal components."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import hand_written, peers
from benchmarks.floors import READERS, best_reader
from benchmarks.harness import Call, Check, Contender
from benchmarks.operations import Operation, components, fresh
from benchmarks.problems import GaussianProblem, Size

READ_AND_DRAW = "floor: read the root, draw the normals"
READ = "floor: read the root"
READ_AND_WRITE = "floor: read the root, write the result"


def reader(problem: GaussianProblem) -> Call:
    """Return the fastest way to read the deviations once."""
    storage = problem.storage
    read = READERS[best_reader(storage)]
    vector = torch.ones(storage.shape[1], dtype=storage.dtype, device=storage.device)
    return lambda: read(storage, vector)


def reader_and(make: Callable[[GaussianProblem], Any]) -> Callable[[GaussianProblem], Call]:
    """Return the preparation of a floor: one read of the deviations, then a fresh result from ``make``."""

    def prepare(problem: GaussianProblem) -> Call:
        read = reader(problem)

        def call() -> Any:
            read()
            return make(problem)

        return call

    return prepare


def _normals(count: int) -> Callable[[GaussianProblem], Tensor]:
    return lambda p: torch.empty(count, p.size.numel, dtype=p.dtype, device=p.device).normal_()


def _ours(count: int) -> Callable[[GaussianProblem], Call]:
    def prepare(problem: GaussianProblem) -> Call:
        ready = peers.posterior(problem)
        return lambda: ready.sample(count)

    return prepare


def _distribution(make: Callable[[GaussianProblem], Any], count: int) -> Callable[[GaussianProblem], Call]:
    """A new distribution for every call, so that no cached root is reused."""

    def prepare(problem: GaussianProblem) -> Call:
        make(problem)  # the inputs are in place before anything is measured
        return lambda: make(problem).rsample(torch.Size([count]))

    return prepare


def _hand(count: int) -> Callable[[GaussianProblem], Call]:
    def prepare(problem: GaussianProblem) -> Call:
        storage, diag, mean = problem.storage, problem.diag, problem.mean
        return lambda: hand_written.sample(storage, diag, mean, count)

    return prepare


def _draw_operation(count: int) -> Operation:
    def contenders(size: Size) -> Sequence[Contender]:
        return (
            Contender(peers.OURS, _ours(count)),
            Contender("our MultivariateNormal.rsample", _distribution(peers.distribution, count)),
            Contender(peers.MIXED, _distribution(peers.mixed, count), note="adds the mean out of place: two outputs"),
            Contender(peers.HAND, _hand(count)),
            Contender(peers.TORCH, _distribution(peers.torch_normal, count)),
            Contender(peers.SHIPPED, _distribution(peers.shipped, count)),
            Contender(READ_AND_DRAW, reader_and(_normals(count)), floor=True),
        )

    return Operation(
        name="sample" if count == 1 else f"sample_{count}",
        title="one sample" if count == 1 else f"{count} samples",
        contenders=contenders,
        check=lambda problem, draws: problem.oracle.sample_check(draws),
        result_bytes=lambda size: fresh(size, factor=count),
        traffic=lambda size: (size.numel * (size.rank + 2 + count), size.numel * count),
        sweep=True,
        heavy=(peers.SHIPPED, peers.MIXED, "our MultivariateNormal.rsample"),
        estimate=lambda size: {"operation": "sample", "samples": count},
    )


def _diagonal_contenders(size: Size) -> Sequence[Contender]:
    def prepare(make: Callable[[GaussianProblem], Any]) -> Callable[[GaussianProblem], Call]:
        def inner(problem: GaussianProblem) -> Call:
            make(problem)
            return lambda: make(problem).diagonal()

        return inner

    def hand(problem: GaussianProblem) -> Call:
        storage, diag = problem.storage, problem.diag
        return lambda: hand_written.diagonal(storage, diag)

    def torch_prepare(problem: GaussianProblem) -> Call:
        normal = peers.torch_normal(problem)
        return lambda: peers.torch_normal_variance(normal)

    return (
        Contender(peers.OURS, prepare(peers.operator)),
        Contender(peers.HAND, hand),
        Contender(peers.SHIPPED, prepare(lambda p: peers.shipped_operator(p.storage.mT, p.diag))),
        Contender(peers.TORCH, torch_prepare),
        Contender(READ_AND_WRITE, reader_and(lambda p: torch.empty_like(p.diag).fill_(1.0)), floor=True),
    )


def _components_contenders(size: Size) -> Sequence[Contender]:
    k = components(size)

    def ours(problem: GaussianProblem) -> Call:
        operator = peers.operator(problem)
        return lambda: _rows(operator.principal_components(k))

    def hand(problem: GaussianProblem) -> Call:
        storage = problem.storage
        return lambda: hand_written.principal_components(storage, k)

    def randomized(problem: GaussianProblem) -> Call:
        from sklearn.utils.extmath import randomized_svd

        matrix = problem.storage.mT.cpu().numpy()

        def call() -> tuple[Tensor, Tensor]:
            left, singular, _ = randomized_svd(matrix, n_components=k, random_state=0)
            return torch.from_numpy(singular).double().square(), torch.from_numpy(left.T)

        return call

    def low_rank(
        problem: GaussianProblem, function: Callable[..., tuple[Tensor, Tensor, Tensor]], **options: Any
    ) -> Call:
        root = problem.storage.mT
        q = min(k + 10, size.rank, size.numel)

        def call() -> tuple[Tensor, Tensor]:
            left, singular, _ = function(root, q=q, **options)
            return singular[:k].double().square(), left[:, :k].mT

        return call

    return (
        Contender(peers.OURS, ours),
        Contender(peers.HAND, hand),
        Contender("torch.svd_lowrank", lambda p: low_rank(p, torch.svd_lowrank)),
        Contender("torch.pca_lowrank", lambda p: low_rank(p, torch.pca_lowrank, center=False)),
        Contender("scikit-learn randomized_svd", randomized, package="scikit-learn"),
        Contender(READ_AND_WRITE, reader_and(_basis(k)), floor=True),
    )


def _basis(k: int) -> Callable[[GaussianProblem], Tensor]:
    return lambda p: torch.empty(k, p.size.numel, dtype=p.dtype, device=p.device).fill_(1.0)


def _rows(pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pairs[0], pairs[1].mT


def _components_check(problem: GaussianProblem, answer: tuple[Tensor, Tensor]) -> Check:
    errors = problem.oracle.components_errors(*(part.to(problem.device) for part in answer))
    return Check.of(
        variances=(errors["variances"], 1e-4),
        residual=(errors["residual"], 1e-3),
        orthonormal=(errors["orthonormal"], 1e-4),
    )


OPERATIONS = (
    _draw_operation(1),
    _draw_operation(30),
    Operation(
        name="diagonal",
        title="diagonal",
        contenders=_diagonal_contenders,
        check=lambda problem, answer: Check.of(diagonal=(problem.oracle.diagonal_error(answer), 1e-5)),
        result_bytes=fresh,
        traffic=lambda size: (size.numel * (size.rank + 2), 0),
        sweep=True,
        estimate=lambda size: {"operation": "diagonal"},
    ),
    Operation(
        name="principal_components",
        title="principal components (5)",
        contenders=_components_contenders,
        check=_components_check,
        result_bytes=lambda size: fresh(size, factor=components(size)),
        traffic=lambda size: (size.numel * (size.rank + components(size)), 0),
        sweep=True,
        heavy=("torch.pca_lowrank", "scikit-learn randomized_svd"),
        estimate=lambda size: {"operation": "principal_components", "samples": components(size)},
    ),
)
