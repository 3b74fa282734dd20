"""Log-densities, log-determinants, solves, entropy, Kullback-Leibler divergence and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import hand_written, peers
from benchmarks.draw_operations import READ, reader
from benchmarks.harness import Call, Check, Contender
from benchmarks.operations import Operation, fresh
from benchmarks.oracle import Oracle, kl_divergence
from benchmarks.problems import GaussianProblem, Size

Make = Callable[[GaussianProblem], Any]


def new_each_time(make: Make, use: Callable[[Any, GaussianProblem], Any]) -> Callable[[GaussianProblem], Call]:
    """Prepare a call that makes its object anew, so that nothing is cached."""

    def prepare(problem: GaussianProblem) -> Call:
        make(problem), problem.value  # inputs are in place before anything is measured
        return lambda: use(make(problem), problem)

    return prepare


def made_once(make: Make, use: Callable[[Any, GaussianProblem], Any]) -> Callable[[GaussianProblem], Call]:
    """Prepare a call on one object that has been used before, so that its caches are filled."""

    def prepare(problem: GaussianProblem) -> Call:
        ready = make(problem)
        use(ready, problem)
        return lambda: use(ready, problem)

    return prepare


def _shipped_operator(problem: GaussianProblem) -> Any:
    return peers.shipped_operator(problem.storage.mT, problem.diag)


def _log_prob(distribution: Any, problem: GaussianProblem) -> Any:
    return distribution.log_prob(problem.value)


def _read(problem: GaussianProblem) -> Call:
    return reader(problem)


def _new_log_prob(size: Size) -> Sequence[Contender]:
    def hand(problem: GaussianProblem) -> Call:
        storage, diag, mean, value = problem.storage, problem.diag, problem.mean, problem.value
        return lambda: hand_written.log_prob(storage, diag, mean, value, hand_written.factorize(storage, diag))

    return (
        Contender(peers.OURS, new_each_time(peers.posterior, _log_prob)),
        Contender(peers.HAND, hand),
        Contender(peers.TORCH, new_each_time(peers.torch_normal, _log_prob)),
        Contender(peers.SHIPPED, new_each_time(peers.shipped, _log_prob)),
        Contender(READ, _read, floor=True),
    )


def _cached_log_prob(size: Size) -> Sequence[Contender]:
    def hand(problem: GaussianProblem) -> Call:
        storage, diag, mean, value = problem.storage, problem.diag, problem.mean, problem.value
        factor = hand_written.factorize(storage, diag)
        return lambda: hand_written.log_prob(storage, diag, mean, value, factor)

    return (
        Contender(peers.OURS, made_once(peers.posterior, _log_prob)),
        Contender(peers.HAND, hand),
        Contender(peers.TORCH, made_once(peers.torch_normal, _log_prob)),
        Contender(peers.SHIPPED, made_once(peers.shipped, _log_prob), note="factorises again on every call"),
        Contender(READ, _read, floor=True),
    )


def _logdet(size: Size) -> Sequence[Contender]:
    def hand(problem: GaussianProblem) -> Call:
        storage, diag = problem.storage, problem.diag
        return lambda: hand_written.factorize(storage, diag)[1]

    return (
        Contender(peers.OURS, new_each_time(peers.operator, lambda op, p: op.logdet())),
        Contender(peers.HAND, hand),
        Contender(peers.SHIPPED, new_each_time(_shipped_operator, lambda op, p: op.logdet())),
        Contender(READ, _read, floor=True),
    )


def _entropy(size: Size) -> Sequence[Contender]:
    def dense(size: Size) -> int:
        return 4 * size.numel**2 * size.itemsize  # the matrix, its copies and its factor

    return (
        Contender(peers.OURS, new_each_time(peers.posterior, lambda d, p: d.entropy())),
        Contender(peers.TORCH, new_each_time(peers.torch_normal, lambda d, p: d.entropy())),
        Contender(peers.SHIPPED, new_each_time(peers.shipped, lambda d, p: d.entropy()), need=dense),
        Contender(READ, _read, floor=True),
    )


def _kl(size: Size) -> Sequence[Contender]:
    def pair(kind: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[GaussianProblem], Call]:
        def prepare(problem: GaussianProblem) -> Call:
            root = problem.storage.mT
            inputs = ((problem.mean, root, problem.diag), (problem.other_mean, root, problem.other_diag))
            return lambda: torch.distributions.kl_divergence(*(kind(*given) for given in inputs))

        return prepare

    def ours(mean: Tensor, root: Tensor, diag: Tensor) -> Any:
        return peers.lb.MultivariateNormal(mean, peers.lb.LowRankPlusDiagLinearOperator(root, diag))

    def shipped(mean: Tensor, root: Tensor, diag: Tensor) -> Any:
        return peers.gpytorch.distributions.MultivariateNormal(mean, peers.shipped_operator(root, diag))

    def torch_kind(mean: Tensor, root: Tensor, diag: Tensor) -> Any:
        return torch.distributions.LowRankMultivariateNormal(mean, root, diag, validate_args=False)

    return (
        Contender(peers.OURS, pair(ours)),
        Contender(peers.TORCH, pair(torch_kind)),
        Contender(peers.SHIPPED, pair(shipped)),
        Contender(READ, _read, floor=True),
    )


def _kl_check(problem: GaussianProblem, answer: Tensor) -> Check:
    other = Oracle(problem.storage, problem.other_diag, problem.other_mean)
    return relative(float(answer), kl_divergence(problem.oracle, other), 1e-3)


def relative(found: float, exact: float, tolerance: float) -> Check:
    """Judge a number by its relative error; the error in nats is told too."""
    return Check.of(relative=((found - exact) / abs(exact), tolerance), absolute=(found - exact, float("inf")))


def _backward(size: Size) -> Sequence[Contender]:
    def leaves(make: Callable[[Tensor, Tensor, GaussianProblem], Any]) -> Callable[[GaussianProblem], Call]:
        def prepare(problem: GaussianProblem) -> Call:
            root = problem.storage.mT.detach().requires_grad_()
            diag, value = problem.diag.detach().requires_grad_(), problem.value

            def call() -> tuple[Tensor, Tensor]:
                root.grad = diag.grad = None
                make(root, diag, problem).log_prob(value).backward()
                rows, diagonal = root.grad, diag.grad
                root.grad = diag.grad = None
                assert rows is not None and diagonal is not None
                return rows.mT, diagonal

            return call

        return prepare

    def ours(root: Tensor, diag: Tensor, p: GaussianProblem) -> Any:
        return peers.lb.MultivariateNormal(p.mean, peers.lb.LowRankPlusDiagLinearOperator(root, diag))

    def shipped(root: Tensor, diag: Tensor, p: GaussianProblem) -> Any:
        return peers.gpytorch.distributions.MultivariateNormal(p.mean, peers.shipped_operator(root, diag))

    def torch_kind(root: Tensor, diag: Tensor, p: GaussianProblem) -> Any:
        return torch.distributions.LowRankMultivariateNormal(p.mean, root, diag, validate_args=False)

    def hand(problem: GaussianProblem) -> Call:
        inputs = problem.storage, problem.diag, problem.mean, problem.value
        return lambda: hand_written.log_prob_gradients(*inputs)

    return (
        Contender(peers.OURS, leaves(ours)),
        Contender(peers.HAND, hand),
        Contender(peers.TORCH, leaves(torch_kind)),
        Contender(peers.SHIPPED, leaves(shipped)),
        Contender(READ, _read, floor=True),
    )


def _backward_check(problem: GaussianProblem, answer: tuple[Tensor, Tensor]) -> Check:
    rows, diag = problem.oracle.gradient_errors(problem.value, *answer)
    return Check.of(root_gradient=(rows, 1e-3), diag_gradient=(diag, 1e-3))


def _twice_read(size: Size) -> tuple[float, float]:
    return size.numel * (2 * size.rank + 4), 0


def _once_read(size: Size) -> tuple[float, float]:
    return size.numel * (size.rank + 1), 0


OPERATIONS = (
    Operation(
        name="log_prob_new",
        title="log_prob, new operator",
        contenders=_new_log_prob,
        check=lambda p, answer: relative(float(answer), p.oracle.log_prob(p.value), 1e-5),
        result_bytes=lambda size: 8,
        traffic=lambda size: (size.numel * (3 * size.rank + 5), 0),
        sweep=True,
        estimate=lambda size: {"operation": "log_prob"},
    ),
    Operation(
        name="log_prob_cached",
        title="log_prob, factorised",
        contenders=_cached_log_prob,
        check=lambda p, answer: relative(float(answer), p.oracle.log_prob(p.value), 1e-5),
        result_bytes=lambda size: 8,
        traffic=_twice_read,
        sweep=True,
        estimate=lambda size: {"operation": "log_prob"},
    ),
    Operation(
        name="logdet",
        title="logdet, new operator",
        contenders=_logdet,
        check=lambda p, answer: relative(float(answer), p.oracle.logdet(), 1e-5),
        result_bytes=lambda size: 8,
        traffic=_once_read,
        sweep=True,
        estimate=lambda size: {"operation": "logdet"},
    ),
    Operation(
        name="entropy",
        title="entropy, new operator",
        contenders=_entropy,
        check=lambda p, answer: relative(float(answer), p.oracle.entropy(), 1e-5),
        result_bytes=lambda size: 8,
        traffic=_once_read,
        estimate=lambda size: {"operation": "entropy"},
    ),
    Operation(
        name="kl",
        title="KL divergence",
        contenders=_kl,
        check=_kl_check,
        result_bytes=lambda size: 8,
        traffic=_twice_read,
        heavy=(peers.SHIPPED,),
        estimate=lambda size: {"operation": "kl"},
    ),
    Operation(
        name="log_prob_backward",
        title="log_prob and its gradients",
        contenders=_backward,
        check=_backward_check,
        result_bytes=lambda size: fresh(size, factor=1, root=1),
        traffic=lambda size: (size.numel * (4 * size.rank + 6), 0),
        estimate=lambda size: {"operation": "log_prob_backward"},
    ),
)
