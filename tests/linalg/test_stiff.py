"""A few coordinates whose variance was clamped far below their deviations, against 80-digit arithmetic."""

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.stiff import stiff_ridge, stiff_triangle
from tests.linalg.cases import F64, FEW, Case
from tests.oracles import assert_close, exact_gaussian

D, K = 25, 6


def clamped(count: int, dtype: torch.dtype, floor: float = 1e-30) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(count)
    root, diag = torch.randn(K, D, generator=g).mT * 1e-2, torch.rand(D, generator=g) * 1e-4 + 1e-5
    diag[torch.randperm(D, generator=g)[:count]] = floor
    return root.to(dtype), diag.to(dtype), torch.randn(D, generator=g).to(dtype) * 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("count", [1, 3, K - 1, K, K + 1, 2 * K])
def test_log_determinant_and_quadratic_form(count: int, floor: float, dtype: torch.dtype) -> None:
    root, diag, x = clamped(count, dtype, floor)
    logdet, quadratic = exact_gaussian(root, diag, x)
    op = LowRankPlusDiagLinearOperator(root, diag)
    assert abs(op.logdet().item() - logdet) < 0.01
    assert op.inv_quad(x).item() == pytest.approx(quadratic, rel=1e-5)
    batch = LowRankPlusDiagLinearOperator(torch.stack((root, root)), torch.stack((diag, diag + 1e-3)))
    other = exact_gaussian(root, diag + 1e-3, x)
    values, logdets = batch.inv_quad_logdet(x.unsqueeze(-1).expand(2, D, 1), logdet=True)
    torch.testing.assert_close(logdets, torch.tensor([logdet, other[0]]).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(values, torch.tensor([quadratic, other[1]]).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [1, 3, K, K + 1])
def test_a_solve_is_right_or_refused(count: int) -> None:
    root, diag, x = clamped(count, F64)
    op = LowRankPlusDiagLinearOperator(root, diag)
    _, quadratic = exact_gaussian(root, diag, x)
    try:
        solution = op.solve(x)
    except NotPSDError as error:
        assert "Raise the smallest variances" in str(error)
    else:
        assert (x @ solution).item() == pytest.approx(quadratic, rel=1e-2)


@pytest.mark.parametrize("use", ["root", "inverse root", "inverse diagonal", "inverse sample"])
def test_what_float64_loses_is_refused(use: str) -> None:
    root, diag, x = clamped(3, torch.float32)
    op = LowRankPlusDiagLinearOperator(root, diag)
    calls = {
        "root": lambda: op.root_decomposition().root @ x,
        "inverse root": lambda: op.root_inv_decomposition().root @ x,
        "inverse diagonal": lambda: op.inverse().diagonal(),
        "inverse sample": lambda: op.inverse().sample(1),
    }
    with pytest.raises(NotPSDError, match="variances that are not too far below the deviations"):
        calls[use]()


def test_draws_need_no_factorisation() -> None:
    root, diag, _ = clamped(3, F64)
    draws = LowRankPlusDiagLinearOperator(root, diag).sample(3, torch.Generator().manual_seed(0))
    assert draws.isfinite().all() and diag.min() < 1e-29


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_route_agrees_with_dense_where_nothing_is_stiff(case: Case) -> None:
    op, sigma = case.make()
    x = case.columns(*case.batch, case.dim, 2)
    triangle = stiff_triangle(op.factors)
    logdet = 2 * triangle.diagonal(dim1=-2, dim2=-1).log().sum(-1) + op.diag.double().log().sum(-1)
    assert_close(logdet, torch.logdet(sigma), F64, 1e3)
    assert (triangle.triu(1) == 0).all()
    quadratic, weights = stiff_ridge(op.factors, x)
    solution = torch.linalg.solve(sigma, x.double())
    assert_close(quadratic, (x.double() * solution).sum(-2), F64, 1e4)
    assert_close(weights, op.double().project(solution), F64, 1e4)
