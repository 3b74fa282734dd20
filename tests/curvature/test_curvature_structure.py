"""Curvature operators under every operation of linear_operator: exact, or refused, and never by an iteration."""

import pytest
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from lowrank_bdl.curvature.adapters import from_curvlinops
from lowrank_bdl.curvature.fisher_operator import FisherLinearOperator
from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.curvature.hessian import HessianLinearOperator
from tests.linalg.operations import F64, columns, refused_operations
from tests.oracles import assert_close

REFUSED = {
    # what a matrix that may be singular or indefinite has not, whatever its size
    *("solve", "solve of a vector", "solve from the left", "torch.linalg.solve", "logdet", "torch.logdet"),
    *("inv_quad", "inv_quad of a vector", "inv_quad unreduced", "inv_quad_logdet", "cholesky", "torch.linalg.cholesky"),
    *("root_decomposition", "root_inv_decomposition", "zero_mean_mvn_samples", "sqrt_inv_matmul", "pivoted_cholesky"),
}


def operator(name: str) -> LinearOperator:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    data = (columns(9, 2), torch.arange(9) % 2)
    if name == "Fisher":
        return FisherLinearOperator(net, "categorical", data)
    kind = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator}[name]
    return kind(net, nn.functional.cross_entropy, data)


@pytest.mark.parametrize("size", [800, 4])
@pytest.mark.parametrize("name", ["Hessian", "GGN", "Fisher"])
def test_every_operation_is_exact_or_refused(name: str, size: int) -> None:
    op = operator(name)
    refused = refused_operations(op, op.to_dense(), size)
    assert refused >= REFUSED
    kept = {"matmul", "rmatmul", "add_jitter", "sub", "negative", "index of a principal block", "expand", "unsqueeze"}
    assert not refused & (kept | {"eigh", "eigvalsh", "svd", "torch.add", "sum over a batch", "batch entry", "repeat"})
    if size == 800 and name != "Hessian":
        assert not refused & {
            "solve of a shifted operator",
            "logdet of a shifted operator",
            "solve of a sum with a tensor",
        }


def test_batches_of_one_hessian() -> None:
    op = operator("Hessian")
    dense, size = op.to_dense(), op.shape[-1]
    batch = op.unsqueeze(0).expand(3, size, size)
    x = columns(3, size, 2)
    assert batch.shape == (3, size, size)
    assert_close(batch @ x, dense @ x)
    assert_close((batch * 2).diagonal(), 2 * dense.diagonal().expand(3, -1))
    assert_close(batch[1].to_dense(), dense)
    assert_close(batch.sum(0) @ x[0], 3 * dense @ x[0])
    assert_close(batch[:2, 1, :4], dense[1, :4].expand(2, -1))
    assert_close(batch.eigvalsh(), torch.linalg.eigvalsh(dense).expand(3, -1))


def test_eigenvalues_of_sums_and_multiples_keep_their_signs() -> None:
    op = operator("Hessian")
    values = torch.linalg.eigvalsh(op.to_dense())
    assert values[0] < 0
    assert_close((op * 2).eigvalsh(), 2 * values)
    assert_close((-op).eigh()[0], -values.flip(0))
    assert_close((op + op.add_jitter(0.1)).eigvalsh(), 2 * values + 0.1)


class _Foreign:
    """What is used of a curvlinops operator."""

    dtype, device = F64, torch.device("cpu")

    def __init__(self, matrix: Tensor, symmetric: bool) -> None:
        self.matrix, self.shape, self.SELF_ADJOINT = matrix, tuple(matrix.shape), symmetric

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors

    def adjoint(self) -> "_Foreign":
        return _Foreign(self.matrix.mT, self.SELF_ADJOINT)


@pytest.mark.parametrize("size", [800, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_operators_of_another_library(symmetric: bool, size: int) -> None:
    matrix = columns(12, 12)
    matrix = matrix @ matrix.mT + torch.eye(12, dtype=F64) if symmetric else matrix + 9 * torch.eye(12, dtype=F64)
    refused = refused_operations(from_curvlinops(_Foreign(matrix, symmetric)), matrix, size)
    assert not refused & {"matmul", "rmatmul", "mT", "add_jitter", "svd", "index of a principal block"}
    if size == 800:
        assert not refused & {"solve", "logdet", "solve of a shifted operator"}
    assert symmetric or refused >= {"eigh", "cholesky", "root_decomposition"}
