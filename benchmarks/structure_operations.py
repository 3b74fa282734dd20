"""Solves of scaled, added and indexed matrices, marginals, and files."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpytorch
import torch
from safetensors.torch import load_file
from torch import Tensor

import lowrank_bdl as lb
from benchmarks import hand_written, peers
from benchmarks.density_operations import made_once, new_each_time
from benchmarks.draw_operations import READ_AND_WRITE, reader_and
from benchmarks.harness import Call, Check, Contender
from benchmarks.operations import Operation, fresh
from benchmarks.oracle import Oracle
from benchmarks.problems import GaussianProblem, Size

FRESH = "fresh operator of that size"
FRESH_READY = "fresh operator, inputs ready"
COPY = "floor: copy the kept coordinates"
WRITE_FILE = "floor: write and sync the bytes"
READ_FILE = "floor: read the file"


def _solve(operator: Any, problem: GaussianProblem) -> Any:
    return operator.solve(problem.rhs)


def _ready(problem: GaussianProblem) -> None:
    """Put the inputs of a solve in place, so that they count in no measurement."""
    problem.storage, problem.diag, problem.rhs  # noqa: B018


def _with_inputs(prepare: Callable[[GaussianProblem], Call]) -> Callable[[GaussianProblem], Call]:
    def inner(problem: GaussianProblem) -> Call:
        _ready(problem)
        return prepare(problem)

    return inner


def _shipped_operator(problem: GaussianProblem) -> Any:
    return peers.shipped_operator(problem.storage.mT, problem.diag)


def _hand_solve(storage: Tensor, diag: Tensor, rhs: Tensor) -> Tensor:
    cholesky, _ = hand_written.factorize(storage, diag)
    solution = hand_written.ridge(storage, diag, cholesky, rhs, solve=True)[2]
    assert solution is not None
    return solution


def _floor() -> Contender:
    return Contender(READ_AND_WRITE, reader_and(lambda p: torch.empty_like(p.diag).fill_(1.0)), floor=True)


def _new_solve(size: Size) -> Sequence[Contender]:
    return (
        Contender(peers.OURS, _with_inputs(new_each_time(peers.operator, _solve))),
        Contender(peers.HAND, _with_inputs(lambda p: lambda: _hand_solve(p.storage, p.diag, p.rhs))),
        Contender(peers.SHIPPED, _with_inputs(new_each_time(_shipped_operator, _solve))),
        _floor(),
    )


def _cached_solve(size: Size) -> Sequence[Contender]:
    def hand(problem: GaussianProblem) -> Call:
        cholesky, _ = hand_written.factorize(problem.storage, problem.diag)
        return lambda: hand_written.ridge(problem.storage, problem.diag, cholesky, problem.rhs, solve=True)[2]

    return (
        Contender(peers.OURS, _with_inputs(made_once(peers.operator, _solve))),
        Contender(peers.HAND, _with_inputs(hand)),
        Contender(peers.SHIPPED, _with_inputs(made_once(_shipped_operator, _solve))),
        _floor(),
    )


def _scaled_solve(size: Size) -> Sequence[Contender]:
    def fresh_operator(problem: GaussianProblem) -> Any:
        return lb.LowRankPlusDiagLinearOperator(problem.storage.mT, problem.diag * 2, mix=2**0.5)

    def scaled(make: Callable[[GaussianProblem], Any]) -> Callable[[GaussianProblem], Call]:
        def prepare(problem: GaussianProblem) -> Call:
            operator = make(problem)
            return lambda: (2.0 * operator).solve(problem.rhs)

        return _with_inputs(prepare)

    return (
        Contender(peers.OURS, scaled(peers.operator)),
        Contender(FRESH, _with_inputs(new_each_time(fresh_operator, _solve))),
        Contender(peers.SHIPPED, scaled(_shipped_operator)),
    )


def _halves(problem: GaussianProblem) -> tuple[Tensor, Tensor]:
    middle = problem.size.rank // 2
    return problem.storage[:middle], problem.storage[middle:]


def _sum_solve(size: Size) -> Sequence[Contender]:
    def added(make: Callable[[Tensor, Tensor], Any]) -> Callable[[GaussianProblem], Call]:
        def prepare(problem: GaussianProblem) -> Call:
            first, second = (make(half.mT, problem.diag) for half in _halves(problem))
            return lambda: (first + second).solve(problem.rhs)

        return _with_inputs(prepare)

    def stacked(problem: GaussianProblem) -> Any:
        return lb.LowRankPlusDiagLinearOperator(torch.cat(_halves(problem)).mT, problem.diag + problem.diag)

    def ready(problem: GaussianProblem) -> Any:
        return lb.LowRankPlusDiagLinearOperator(problem.storage.mT, problem.diag + problem.diag)

    return (
        Contender(peers.OURS, added(lb.LowRankPlusDiagLinearOperator)),
        Contender(FRESH, _with_inputs(new_each_time(stacked, _solve)), note="stacks the two roots first"),
        Contender(FRESH_READY, _with_inputs(new_each_time(ready, _solve)), note="its root is given stacked"),
        Contender(peers.SHIPPED, added(peers.shipped_operator)),
    )


def _indexed_solve(size: Size) -> Sequence[Contender]:
    def indexed(make: Callable[[GaussianProblem], Any]) -> Callable[[GaussianProblem], Call]:
        def prepare(problem: GaussianProblem) -> Call:
            operator, index = make(problem), problem.index
            rhs = problem.rhs[index]
            return lambda: operator[index][:, index].solve(rhs)

        return _with_inputs(prepare)

    def gathered(problem: GaussianProblem) -> Call:
        storage, diag, index = problem.storage, problem.diag, problem.index
        rhs = problem.rhs[index]
        return lambda: lb.LowRankPlusDiagLinearOperator(storage[:, index].mT, diag[index]).solve(rhs)

    return (
        Contender(peers.OURS, indexed(peers.operator)),
        Contender(FRESH, _with_inputs(gathered), note="gathers its rows first"),
        Contender(peers.SHIPPED, indexed(_shipped_operator)),
    )


def _solve_check(of: Callable[[GaussianProblem], tuple[Oracle, Tensor]]) -> Callable[[GaussianProblem, Tensor], Check]:
    def check(problem: GaussianProblem, answer: Tensor) -> Check:
        oracle, rhs = of(problem)
        return Check.of(solve=(oracle.solve_error(rhs, answer), 1e-4))

    return check


def _indexed_oracle(problem: GaussianProblem) -> tuple[Oracle, Tensor]:
    index = problem.index
    return Oracle(problem.storage[:, index], problem.diag[index]), problem.rhs[index]


def _marginal(size: Size) -> Sequence[Contender]:
    def ours(problem: GaussianProblem) -> Call:
        posterior = peers.posterior(problem)

        def call() -> tuple[Tensor, Tensor]:
            kept = posterior.marginal("*.weight").covariance
            return kept.root.mT, kept.diag

        return call

    def shipped(problem: GaussianProblem) -> Call:
        normal, index = peers.shipped(problem), problem.index
        return lambda: normal[index]

    def torch_kind(problem: GaussianProblem) -> Call:
        index, root = problem.index, problem.storage.mT

        def call() -> tuple[Tensor, Tensor]:
            kept = torch.distributions.LowRankMultivariateNormal(
                problem.mean[index], root[index], problem.diag[index], validate_args=False
            )
            return kept._unbroadcasted_cov_factor.mT, kept._unbroadcasted_cov_diag

        return call

    def copy(problem: GaussianProblem) -> Call:
        storage, keep = problem.storage, len(problem.index)
        return lambda: torch.empty(len(storage), keep, dtype=storage.dtype, device=storage.device).copy_(
            storage[:, :keep]
        )

    return (
        Contender(peers.OURS, ours),
        Contender(peers.TORCH, torch_kind),
        Contender(peers.SHIPPED, shipped, note="keeps a lazy slice"),
        Contender(COPY, copy, floor=True),
    )


def _marginal_check(problem: GaussianProblem, answer: Any) -> Check:
    index = problem.index
    if isinstance(answer, gpytorch.distributions.MultivariateNormal):
        expected = problem.diag[index] + problem.storage[:, index].square().sum(0)
        found = answer.lazy_covariance_matrix.diagonal()
        return Check.of(variance=(float(((found - expected) / expected).abs().max()), 1e-4))
    rows, diag = answer
    same = torch.equal(rows, problem.storage[:, index]) and torch.equal(diag, problem.diag[index])
    return Check.of(differs=(0.0 if same else 1.0, 0.5))


def _sync(path: Path) -> Path:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
    return path


def _tensors(problem: GaussianProblem) -> dict[str, Tensor]:
    return {"mean": problem.mean, "diag": problem.diag, "deviations": problem.storage}


def _save(size: Size) -> Sequence[Contender]:
    def ours(problem: GaussianProblem) -> Call:
        posterior, path = peers.posterior(problem), problem.scratch / "ours.safetensors"

        def call() -> Path:
            posterior.save(path)
            return path

        return call

    def torch_save(problem: GaussianProblem) -> Call:
        tensors, path = _tensors(problem), problem.scratch / "torch.pt"

        def call() -> Path:
            torch.save(tensors, path)
            return _sync(path)

        return call

    def floor(problem: GaussianProblem) -> Call:
        arrays = [memoryview(t.cpu().numpy()).cast("B") for t in _tensors(problem).values()]
        path = problem.scratch / "floor.bin"

        def call() -> Path:
            with open(path, "wb") as stream:
                for array in arrays:
                    stream.write(array)
            return _sync(path)

        return call

    return (
        Contender(peers.OURS, ours),
        Contender("torch.save", torch_save, note="not atomic"),
        Contender(WRITE_FILE, floor, floor=True),
    )


def _save_check(problem: GaussianProblem, path: Path) -> Check:
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    same = all(torch.equal(found[name].cpu(), tensor.cpu()) for name, tensor in _tensors(problem).items())
    return Check.of(differs=(0.0 if same else 1.0, 0.5))


def _load(size: Size) -> Sequence[Contender]:
    def ours(problem: GaussianProblem) -> Call:
        from lowrank_bdl.posteriors.gaussian import GaussianPosterior

        path, device = problem.scratch / "ours.safetensors", problem.device
        peers.posterior(problem).save(path)

        def call() -> dict[str, Tensor]:
            loaded = GaussianPosterior.load(path, device=device)
            kept = loaded.covariance
            return {"mean": loaded.mean, "diag": kept.diag, "deviations": kept.root.mT}

        return call

    def torch_load(problem: GaussianProblem) -> Call:
        path, device = problem.scratch / "torch.pt", problem.device
        torch.save(_tensors(problem), path)
        return lambda: torch.load(path, weights_only=True, map_location=device)

    def floor(problem: GaussianProblem) -> Call:
        path = problem.scratch / "floor.bin"
        with open(path, "wb") as stream:
            for tensor in _tensors(problem).values():
                stream.write(memoryview(tensor.cpu().numpy()).cast("B"))

        def call() -> Tensor:
            target = torch.empty(os.path.getsize(path), dtype=torch.uint8)
            with io.FileIO(path) as stream:
                view, done = memoryview(target.numpy()), 0
                while done < len(view):
                    done += stream.readinto(view[done:]) or len(view)
            return target.to(problem.device)

        return call

    return (
        Contender(peers.OURS, ours),
        Contender("torch.load", torch_load),
        Contender(READ_FILE, floor, floor=True),
    )


def _load_check(problem: GaussianProblem, found: dict[str, Tensor]) -> Check:
    same = all(torch.equal(found[name], tensor) for name, tensor in _tensors(problem).items())
    return Check.of(differs=(0.0 if same else 1.0, 0.5))


def _scaled_oracle(problem: GaussianProblem) -> tuple[Oracle, Tensor]:
    return Oracle(problem.storage * 2**0.5, problem.diag * 2), problem.rhs


def _factorised_solve(size: Size) -> tuple[float, float]:
    return size.numel * (3 * size.rank + 5), 0


def _files(size: Size) -> int:
    return fresh(size, factor=2, root=1)


DISK_LIMIT = 10_000_000
OPERATIONS = (
    Operation(
        name="solve_new",
        title="solve, new operator",
        contenders=_new_solve,
        check=_solve_check(lambda p: (p.oracle, p.rhs)),
        result_bytes=fresh,
        traffic=_factorised_solve,
        sweep=True,
        estimate=lambda size: {"operation": "solve"},
    ),
    Operation(
        name="solve_cached",
        title="solve, factorised",
        contenders=_cached_solve,
        check=_solve_check(lambda p: (p.oracle, p.rhs)),
        result_bytes=fresh,
        traffic=lambda size: (size.numel * (2 * size.rank + 5), 0),
        estimate=lambda size: {"operation": "solve"},
    ),
    Operation(
        name="scaled_solve",
        title="(c · op).solve",
        contenders=_scaled_solve,
        check=_solve_check(_scaled_oracle),
        result_bytes=fresh,
        traffic=_factorised_solve,
        estimate=lambda size: {"operation": "scaled_solve"},
    ),
    Operation(
        name="sum_solve",
        title="(op + op).solve",
        contenders=_sum_solve,
        check=_solve_check(lambda p: (Oracle(p.storage, p.diag + p.diag), p.rhs)),
        result_bytes=fresh,
        traffic=_factorised_solve,
        min_rank=2,
        heavy=(peers.SHIPPED,),
        estimate=lambda size: {"operation": "sum_solve"},
    ),
    Operation(
        name="indexed_solve",
        title="[idx][:, idx].solve",
        contenders=_indexed_solve,
        check=_solve_check(_indexed_oracle),
        result_bytes=lambda size: fresh(size, factor=0.5),
        traffic=lambda size: (size.numel * (2.5 * size.rank + 2), 0),
        estimate=lambda size: {"operation": "indexed_solve"},
    ),
    Operation(
        name="marginal",
        title="marginal (half the parameters)",
        contenders=_marginal,
        check=_marginal_check,
        result_bytes=lambda size: fresh(size, factor=1, root=0.5),
        traffic=lambda size: (size.numel * (size.rank + 2), 0),
        estimate=lambda size: {"operation": "marginal", "fraction": 0.5},
    ),
    Operation(
        name="save",
        title="save",
        contenders=_save,
        check=_save_check,
        result_bytes=lambda size: 0,
        traffic=lambda size: (size.numel * (size.rank + 2), 0),
        max_numel=DISK_LIMIT,
        estimate=lambda size: {"operation": "save"},
    ),
    Operation(
        name="load",
        title="load",
        contenders=_load,
        check=_load_check,
        result_bytes=_files,
        traffic=lambda size: (2 * size.numel * (size.rank + 2), 0),
        max_numel=DISK_LIMIT,
        estimate=lambda size: {"operation": "load"},
    ),
)
