"""Principal directions against dense decompositions."""

import pytest
import torch

from lowrank_bdl.errors import NotConvergedError, ShapeError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from tests.linalg.cases import F32, F64, Case
from tests.oracles import assert_close

CASES = [Case((), 30, 4), Case((), 30, 4, "scalar"), Case((), 30, 4, "matrix"), Case((), 3, 6), Case((), 1, 1),
         Case((), 30, 4, "matrix", F32), Case((), 30, 4, "none", F32, torch.float16)]  # fmt: skip


@pytest.mark.parametrize("of", ["low_rank", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_variances_and_directions(case: Case, of: str) -> None:
    op, sigma = case.make()
    matrix = sigma - torch.diag(op.diag.double()) if of == "low_rank" else sigma
    k = min(op.rank, case.dim)
    values, directions = op.principal_components(k, of=of)
    assert values.dtype == F64 and directions.dtype == case.dtype and directions.shape == (case.dim, k)
    assert directions.mT.is_contiguous()
    assert_close(values, torch.linalg.eigvalsh(matrix).flip(0)[:k], case.dtype, 1e2)
    assert_close(directions.mT @ directions, torch.eye(k).double(), case.dtype, 1e2)
    assert_close(
        matrix @ directions.double(), directions.double() * values, case.dtype, 1e4 if case.dtype == F64 else 1e2
    )
    scaled, same = (op * 3.0).principal_components(k, of=of)
    assert_close(scaled, 3 * values, case.dtype, 1e2)
    assert same.shape == directions.shape


def test_directions_of_very_different_sizes_stay_orthonormal() -> None:
    rows = (
        torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-2, 1e-4, 1e-5])[:, None]
    )
    directions = LowRankPlusDiagLinearOperator(rows.mT, torch.ones(500)).principal_components(4)[1].double()
    assert (directions.mT @ directions - torch.eye(4).double()).abs().max() < 1e-5


def test_bad_arguments() -> None:
    op, _ = Case((), 30, 4).make()
    assert op.principal_components(0)[1].shape == (30, 0)
    with pytest.raises(ShapeError, match="k must be between 0 and 4, the rank; got 5"):
        op.principal_components(5)
    with pytest.raises(ShapeError, match="numerical rank 4; expected k at most that, got 5"):
        (op + op).principal_components(5)
    with pytest.raises(ShapeError, match=r"one matrix; got batch shape \(2,\)"):
        op.expand(2, 30, 30).principal_components(1)
    with pytest.raises(ValueError, match='of must be "low_rank" or "full", got'):
        op.principal_components(1, of="half")
    with pytest.raises(NotConvergedError, match="eigenpairs converged in"):
        Case((), 400, 2).make(spread=1e-3)[0].principal_components(10, of="full", tol=1e-30)
