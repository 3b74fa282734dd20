"""Every public operation of a linear operator against a dense float64 oracle; linear_operator's iterations watched."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import linear_operator
import torch
from linear_operator.functions._pivoted_cholesky import PivotedCholesky
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, LinearOperator, RootLinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.contour_integral_quad import contour_integral_quad
from linear_operator.utils.lanczos import lanczos_tridiag, lanczos_tridiag_to_diag
from linear_operator.utils.linear_cg import linear_cg
from linear_operator.utils.minres import minres
from torch import Tensor

from lowrank_bdl.errors import LowRankBDLError
from lowrank_bdl.linalg import exact

F64 = torch.float64
ITERATIONS = (linear_cg, lanczos_tridiag, lanczos_tridiag_to_diag, psd_safe_cholesky, contour_integral_quad, minres)
REFUSALS = (NotImplementedError, LowRankBDLError, TypeError, IndexError)
NO_NUMBERS = {
    # names and shapes, and what torch_function maps to the operations below
    *("batch_dim", "batch_shape", "device", "dim", "dtype", "is_square", "matrix_shape", "ndim", "ndimension", "numel"),
    *("requires_grad", "shape", "size", "representation", "representation_tree"),
    *("inv_quad_log_det", "log_det"),  # old names
    *("cuda", "half"),  # a device that is not there, a dtype that is refused
}


@contextmanager
def no_iterations(dense_size: int) -> Iterator[list[str]]:
    """Record calls into linear_operator's iterations, which its settings make it take at every size.

    Args:
        dense_size: Coordinates up to which this library computes densely.
    """
    calls: list[str] = []
    with mock.patch.object(exact, "DENSE_SIZE", dense_size):
        with linear_operator.settings.max_cholesky_size(1), linear_operator.settings.ciq_samples(True):
            with _watched(calls), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # isclose() says that it is dense
                yield calls


@contextmanager
def _watched(calls: list[str]) -> Iterator[None]:
    names = {id(function): function.__name__ for function in ITERATIONS}
    with mock.patch.object(PivotedCholesky, "apply", _recorded("pivoted_cholesky", calls, PivotedCholesky.apply)):
        places = [
            (module, name, value)
            for key, module in list(sys.modules.items())
            if key.startswith(("linear_operator", "gpytorch"))
            for name, value in list(vars(module).items())
            if id(value) in names
        ]
        for module, name, value in places:
            setattr(module, name, _recorded(names[id(value)], calls, value))
        try:
            yield
        finally:
            for module, name, value in places:
                setattr(module, name, value)


def _recorded(name: str, calls: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return call


def columns(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def plain(result: Any) -> Any:
    """Return a result with operators made dense, tuples as tuples."""
    if isinstance(result, tuple):
        return tuple(plain(part) for part in result)
    return result.to_dense() if isinstance(result, LinearOperator) else result


def gram(root: Any) -> Tensor:
    dense = plain(root.root if isinstance(root, RootLinearOperator) else root)
    return dense @ dense.mT


def rebuilt(values: Tensor, vectors: Any) -> Tensor:
    vectors = plain(vectors)
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


def second_moments(op: LinearOperator) -> Tensor:
    """Return the mean square of draws along the coordinate axes over their variance: 1, to 6 %."""
    torch.manual_seed(0)
    draws = op.zero_mean_mvn_samples(4000)
    assert draws.shape == (4000, *op.shape[:-1])
    return (draws.square().mean(0) / op.diagonal()).sub(1).abs().max().lt(0.15).double()


def square_operations(n: int) -> dict[str, tuple[Callable[[LinearOperator], Any], Callable[[Tensor], Any]]]:
    """Return name -> (operation, oracle) for a square matrix of n coordinates without batch axes."""
    x, v, left, extra = columns(n, 2), columns(n), columns(3, n), columns(n, 2, seed=5)
    spd = extra @ extra.mT + torch.eye(n, dtype=F64)
    diag = columns(n, seed=6).abs() + 0.1
    index, many = torch.tensor([3, 0, n - 1]), torch.tensor([1, 1, 4])
    mask = torch.arange(n) % 3 == 0
    inverse = torch.linalg.inv
    eye = torch.eye(n, dtype=F64)

    def power(a: Tensor, p: float) -> Tensor:
        values, vectors = torch.linalg.eigh((a + a.mT) / 2)
        return (vectors * values**p) @ vectors.mT

    def forms(a: Tensor) -> Tensor:
        return (x * (inverse(a) @ x)).sum(0)

    def appended(a: Tensor) -> Tensor:
        cross = left @ a / 10
        return torch.cat([torch.cat([a, cross.mT], 1), torch.cat([cross, 100 * torch.eye(3, dtype=F64)], 1)])

    return {
        "matmul": (lambda a: a.matmul(x), lambda a: a @ x),
        "matmul of a vector": (lambda a: a @ v, lambda a: a @ v),
        "matmul of a batch": (lambda a: a @ columns(2, 3, n, 1), lambda a: a @ columns(2, 3, n, 1)),
        "matmul of an operator": (lambda a: a @ (a * 0.5), lambda a: a @ a * 0.5),
        "torch.matmul": (lambda a: torch.matmul(a, x), lambda a: a @ x),
        "rmatmul": (lambda a: a.rmatmul(left), lambda a: left @ a),
        "tensor @ operator": (lambda a: left @ a, lambda a: left @ a),
        "rmatmul of a vector": (lambda a: torch.matmul(v, a), lambda a: v @ a),
        "solve": (lambda a: a.solve(x), lambda a: inverse(a) @ x),
        "solve of a vector": (lambda a: a.solve(v), lambda a: inverse(a) @ v),
        "solve from the left": (lambda a: a.solve(x, left), lambda a: left @ inverse(a) @ x),
        "torch.linalg.solve": (lambda a: torch.linalg.solve(a, x), lambda a: inverse(a) @ x),
        "solve_triangular": (lambda a: a.solve_triangular(x, upper=True), lambda a: inverse(a) @ x),
        "inverse": (lambda a: a.inverse(), inverse),
        "inv_quad": (lambda a: a.inv_quad(x), lambda a: forms(a).sum()),
        "inv_quad of a vector": (lambda a: a.inv_quad(v), lambda a: v @ inverse(a) @ v),
        "inv_quad unreduced": (lambda a: a.inv_quad(x, reduce_inv_quad=False), forms),
        "inv_quad_logdet": (
            lambda a: a.inv_quad_logdet(x, logdet=True),
            lambda a: (forms(a).sum(), torch.logdet(a)),
        ),
        "logdet": (lambda a: a.logdet(), torch.logdet),
        "torch.logdet": (lambda a: torch.logdet(a), torch.logdet),
        "sqrt_inv_matmul": (lambda a: a.sqrt_inv_matmul(x), lambda a: power(a, -0.5) @ x),
        "sqrt_inv_matmul from the left": (
            lambda a: a.sqrt_inv_matmul(x, left),
            lambda a: (left @ power(a, -0.5) @ x, (left @ inverse(a) * left).sum(1)),
        ),
        "root_decomposition": (lambda a: gram(a.root_decomposition()), lambda a: a),
        "root_decomposition as an operator": (lambda a: a.root_decomposition() @ x, lambda a: a @ x),
        "root_inv_decomposition": (lambda a: gram(a.root_inv_decomposition()), inverse),
        "cholesky": (lambda a: a.cholesky(), torch.linalg.cholesky),
        "torch.linalg.cholesky": (
            lambda a: torch.linalg.cholesky(a, upper=True),
            lambda a: torch.linalg.cholesky(a).mT,
        ),
        "eigh": (lambda a: rebuilt(*a.eigh()), lambda a: a),
        "torch.linalg.eigh": (lambda a: torch.linalg.eigh(a)[0], torch.linalg.eigvalsh),
        "eigvalsh": (lambda a: a.eigvalsh(), torch.linalg.eigvalsh),
        "svd": (lambda a: (plain(a.svd()[0]) * a.svd()[1]) @ plain(a.svd()[2]).mT, lambda a: a),
        "torch.linalg.svd": (lambda a: torch.linalg.svd(a)[1].sort().values, lambda a: torch.linalg.svdvals(a).flip(0)),
        "diagonalization": (lambda a: rebuilt(*a.diagonalization()), lambda a: a),
        "diagonalization by symeig": (lambda a: a.diagonalization("symeig")[0], torch.linalg.eigvalsh),
        "zero_mean_mvn_samples": (second_moments, lambda a: torch.ones((), dtype=F64)),
        "pivoted_cholesky": (lambda a: a.pivoted_cholesky(n) @ a.pivoted_cholesky(n).mT, lambda a: a),
        "add_low_rank": (lambda a: a.add_low_rank(extra), lambda a: a + extra @ extra.mT),
        "cat_rows": (
            lambda a: a.cat_rows(left @ a.to_dense() / 10, 100 * torch.eye(3, dtype=F64)),
            appended,
        ),
        "abs": (lambda a: a.abs(), torch.abs),
        "exp": (lambda a: a.exp(), torch.exp),
        "log": (lambda a: a.log(), torch.log),
        "sqrt": (lambda a: a.sqrt(), torch.sqrt),
        "sum": (lambda a: a.sum(), torch.sum),
        "sum over columns": (lambda a: a.sum(-1), lambda a: a.sum(-1)),
        "torch.sum over rows": (lambda a: torch.sum(a, -2), lambda a: a.sum(-2)),
        "prod": (lambda a: a.expand(3, n, n).prod(0), lambda a: a**3),
        "mul": (lambda a: a.mul(2.5), lambda a: 2.5 * a),
        "mul by a tensor": (lambda a: torch.tensor(2.5, dtype=F64) * a, lambda a: 2.5 * a),
        "mul by a batch": (
            lambda a: a.expand(2, n, n) * torch.tensor([0.5, 3.0], dtype=F64).view(2, 1, 1),
            lambda a: torch.stack([0.5 * a, 3 * a]),
        ),
        "torch.mul by an operator": (lambda a: torch.mul(a, DenseLinearOperator(spd)), lambda a: a * spd),
        "mul by a diagonal": (lambda a: a * DiagLinearOperator(diag), lambda a: a * torch.diag(diag)),
        "negative": (lambda a: -a, lambda a: -a),
        "div": (lambda a: a / 4, lambda a: a / 4),
        "torch.div": (lambda a: torch.div(a, 4), lambda a: a / 4),
        "add": (lambda a: a.add(a, alpha=2), lambda a: 3 * a),
        "torch.add": (lambda a: torch.add(a, DenseLinearOperator(spd)), lambda a: a + spd),
        "add a tensor": (lambda a: spd + a, lambda a: a + spd),
        "add a diagonal": (lambda a: a + DiagLinearOperator(diag), lambda a: a + torch.diag(diag)),
        "add zero": (lambda a: a + 0, lambda a: a),
        "sub": (lambda a: a.sub(a * 0.25), lambda a: 0.75 * a),
        "torch.sub": (lambda a: torch.sub(spd, a), lambda a: spd - a),
        "add_diagonal": (lambda a: a.add_diagonal(diag), lambda a: a + torch.diag(diag)),
        "add_diagonal of one number": (lambda a: a.add_diagonal(torch.tensor(0.3, dtype=F64)), lambda a: a + 0.3 * eye),
        "add_jitter": (lambda a: a.add_jitter(0.3), lambda a: a + 0.3 * eye),
        "mT": (lambda a: a.mT, lambda a: a.mT),
        "T": (lambda a: a.T, lambda a: a.mT),
        "t": (lambda a: a.t(), lambda a: a.mT),
        "transpose": (lambda a: a.transpose(-1, -2) @ x, lambda a: a.mT @ x),
        "index of a row": (lambda a: a[3], lambda a: a[3]),
        "index of a column": (lambda a: a[:, -1], lambda a: a[:, -1]),
        "index of an entry": (lambda a: a[2, 5], lambda a: a[2, 5]),
        "index of entries": (lambda a: a[[0, 1], [0, 2]], lambda a: a[[0, 1], [0, 2]]),
        "index of a slice": (lambda a: a[2:6, 1:4], lambda a: a[2:6, 1:4]),
        "index of a principal block": (lambda a: a[index][:, index], lambda a: a[index][:, index]),
        "index of a product with a block": (
            lambda a: a[many, :][:, index] @ columns(3, 2),
            lambda a: a[many][:, index] @ columns(3, 2),
        ),
        "index by a mask": (lambda a: a[mask][:, mask], lambda a: a[mask][:, mask]),
        "expand": (lambda a: a.expand(2, n, n), lambda a: a.expand(2, n, n)),
        "reshape": (lambda a: a.reshape(2, n, n), lambda a: a.expand(2, n, n)),
        "repeat": (lambda a: a.repeat(3, 2, 1, 1), lambda a: a.repeat(3, 2, 1, 1)),
        "repeat twice": (lambda a: a.repeat(2, 1, 1).repeat(3, 1, 1), lambda a: a.repeat(6, 1, 1)),
        "unsqueeze": (lambda a: a.unsqueeze(0), lambda a: a.unsqueeze(0)),
        "squeeze": (lambda a: a.unsqueeze(0).squeeze(0), lambda a: a),
        "permute": (lambda a: a.expand(2, 3, n, n).permute(1, 0, 2, 3), lambda a: a.expand(3, 2, n, n)),
        "batch entry": (lambda a: a.expand(2, 3, n, n)[1, :2], lambda a: a.expand(2, n, n)),
        "sum over a batch": (lambda a: a.expand(3, n, n).sum(0), lambda a: 3 * a),
        "product of an expanded operator": (
            lambda a: a.expand(2, n, n) @ columns(2, n, 2),
            lambda a: a @ columns(2, n, 2),
        ),
        "solve of an expanded operator": (
            lambda a: a.expand(2, n, n).solve(columns(2, n, 2)),
            lambda a: inverse(a) @ columns(2, n, 2),
        ),
        "logdet of an expanded operator": (lambda a: a.unsqueeze(0).logdet(), lambda a: torch.logdet(a)[None]),
        "solve of a multiple": (lambda a: (a * 2).solve(x), lambda a: inverse(a) @ x / 2),
        "solve of a negative multiple": (lambda a: (a / -2).solve(x), lambda a: inverse(a) @ x * -2),
        "logdet of a multiple": (lambda a: (a * 2).logdet(), lambda a: torch.logdet(2 * a)),
        "solve of a shifted operator": (lambda a: a.add_jitter(0.3).solve(x), lambda a: inverse(a + 0.3 * eye) @ x),
        "logdet of a shifted operator": (lambda a: a.add_jitter(0.3).logdet(), lambda a: torch.logdet(a + 0.3 * eye)),
        "solve of a sum": (lambda a: (a + a).solve(x), lambda a: inverse(a) @ x / 2),
        "solve of a sum with a diagonal": (
            lambda a: (a + DiagLinearOperator(diag)).solve(x),
            lambda a: inverse(a + torch.diag(diag)) @ x,
        ),
        "solve of a difference": (lambda a: (a - a * 0.5).solve(x), lambda a: 2 * inverse(a) @ x),
        "solve of a sum with a tensor": (lambda a: (a + spd).solve(x), lambda a: inverse(a + spd) @ x),
        "solve of a block": (
            lambda a: a[index][:, index].solve(columns(3, 1)),
            lambda a: inverse(a[index][:, index]) @ columns(3, 1),
        ),
        "draws of a multiple": (lambda a: second_moments(a * 2), lambda a: torch.ones((), dtype=F64)),
        "draws of a shifted operator": (
            lambda a: second_moments(a.add_jitter(0.3)),
            lambda a: torch.ones((), dtype=F64),
        ),
        "draws of an expanded operator": (
            lambda a: second_moments(a.expand(2, n, n)),
            lambda a: torch.ones((), dtype=F64),
        ),
        "diagonal": (lambda a: a.diagonal(), lambda a: a.diagonal()),
        "torch.diagonal": (lambda a: torch.diagonal(a, dim1=-1, dim2=-2), lambda a: a.diagonal()),
        "to_dense": (lambda a: a.to_dense(), lambda a: a),
        "numpy": (lambda a: torch.from_numpy(a.numpy()), lambda a: a),
        "isclose": (lambda a: a.isclose(a).double(), torch.ones_like),
        "evaluate_kernel": (lambda a: a.evaluate_kernel(), lambda a: a),
        "representation": (lambda a: a.representation_tree()(*a.representation()), lambda a: a),
        "to": (lambda a: a.to(F64), lambda a: a),
        "type": (lambda a: a.type(F64), lambda a: a),
        "double": (lambda a: a.double(), lambda a: a),
        "float": (lambda a: a.float().double(), lambda a: a),
        "cpu": (lambda a: a.cpu(), lambda a: a),
        "clone": (lambda a: torch.clone(a), lambda a: a),
        "detach": (lambda a: a.detach(), lambda a: a),
        "detach_": (lambda a: a.clone().detach_(), lambda a: a),
        "requires_grad_": (lambda a: a.clone().requires_grad_(True).detach(), lambda a: a),
    }


def refused_operations(op: LinearOperator, dense: Tensor, dense_size: int, rtol: float = 1e-8) -> set[str]:
    """Run every operation; return those that were refused, after comparing all others with the oracle.

    Args:
        op: A square float64 operator without batch axes.
        dense: The same matrix.
        dense_size: See `no_iterations`.
        rtol: Tolerance relative to the largest entry; 1e-5 where the operation rounds to float32.
    """
    refused = set()
    for name, (operation, oracle) in square_operations(len(dense)).items():
        with no_iterations(dense_size) as calls:
            try:
                result = plain(operation(op))
            except REFUSALS as error:
                assert len(str(error)) > 10, f"{name}: an error without a sentence: {error!r}"
                refused.add(name)
                continue
            assert not calls, f"{name} of a {type(op).__name__} called {sorted(set(calls))}"
        expected = oracle(dense)
        for got, want in zip(*((r if isinstance(r, tuple) else (r,)) for r in (result, expected)), strict=True):
            tolerance = 1e-5 if name == "float" else rtol
            scale = want.abs().max().item()
            assert got.shape == want.shape, f"{name} of a {type(op).__name__}: {got.shape}, expected {want.shape}"
            apart = (got.double() - want).abs().max().item()
            assert apart <= tolerance * scale, f"{name} of a {type(op).__name__} is {apart / scale:.1e} off"
    return refused
