"""Log-determinants: exact for structured matrices, by quadrature elsewhere."""

import pytest
import torch
from linear_operator.operators import (
    DenseLinearOperator,
    DiagLinearOperator,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
)
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, NotPSDError, ShapeError
from lowrank_bdl.linalg.log_determinant import logdet
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from tests.linalg.cases import F32, F64, Case
from tests.linalg.estimates import assert_honest, matrix, seeded, stacked
from tests.linalg.test_stochastic_trace import structured
from tests.oracles import assert_close


def positive(size: int = 60) -> Tensor:
    dense = matrix("wide", size)
    return dense + 0.1 * torch.eye(size).double()


@pytest.mark.parametrize("name", structured())
def test_structured_matrices_are_exact_and_quadrature_agrees(name: str) -> None:
    operator = structured()[name]
    truth = torch.logdet(operator.to_dense().double())
    exact = logdet(operator)
    assert_close(exact.value, truth, operator.dtype, cond=100)
    assert exact.num_matvecs == 0 and exact.standard_error.item() == exact.truncation.item() == 0
    sampled = logdet(operator, 200, 1000, method="slq", generator=seeded(0))
    assert 0 < sampled.num_matvecs <= 200 * operator.shape[-1]
    # 5.5 standard errors of 200 probes: 1e-7 by Student's t; rounding where the probes all give the same
    assert abs((sampled.value - truth).item()) <= 5.5 * sampled.standard_error.item() + 1e-4


def test_unbiased_with_honest_error_bars() -> None:
    dense = positive(12)
    truth = torch.logdet(dense)
    g = seeded(3)
    values, errors = stacked([logdet(dense, 3, 12, generator=g) for _ in range(300)])
    assert_honest(values, errors, truth)
    for wrong, message in (
        ((values + errors.mean(), errors), "bias: "),
        ((values, errors * 0.5), "error bars: "),
        ((values, errors * 3**0.5), "error bars: "),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_honest(*wrong, truth)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_and_precision(scale: float, dtype: torch.dtype) -> None:
    dense = (positive() * scale).to(dtype)
    found = logdet(dense, 100, 60, generator=seeded(1))
    shift = 60 * torch.tensor(scale).double().log()
    assert found.value.dtype == F64
    assert abs((found.value - torch.logdet(dense.double())).item()) < 5.5 * found.standard_error.item()
    plain = logdet(positive(), 100, 60, generator=seeded(1))
    torch.testing.assert_close(found.value - shift, plain.value, rtol=0, atol={F64: 1e-6, F32: 1e-3}[dtype])


def test_a_covariance_of_weights_in_float32() -> None:
    """Variances near 1e-6 under deviations that are a thousand times larger: the few large eigenvalues are no end."""
    g = seeded(0)
    diag = (torch.rand(3000, generator=g) + 0.5) * 1e-6
    operator = LowRankPlusDiagLinearOperator(torch.randn(3000, 10, generator=g) * 1e-3, diag)
    truth = operator.logdet()
    found = logdet(operator, 30, 60, method="slq", generator=seeded(0))
    assert found.truncation.item() < found.standard_error.item() < 1e-3 * truth.abs().item()
    assert abs((found.value - truth).item()) < 7 * found.standard_error.item()  # 1e-7 by Student's t


def test_functions_tensors_and_operators_agree_and_repeat() -> None:
    dense = positive()
    counts: list[int] = []
    first = logdet(dense, 4, 30, generator=seeded(2), progress=counts.append)
    again = logdet(dense, 4, 30, generator=seeded(2))
    assert torch.equal(first.value, again.value) and counts[-1] == first.num_matvecs == 120
    for other in (
        logdet(DenseLinearOperator(dense), 4, 30, generator=seeded(2)),
        logdet(lambda v: dense @ v, 4, 30, size=60, dtype=F64, generator=seeded(2)),
        logdet(dense, 4, 30, generator=seeded(2), reorthogonalize=True),
    ):
        torch.testing.assert_close(other.value, first.value, rtol=1e-6, atol=0)
        torch.testing.assert_close(other.standard_error, first.standard_error, rtol=1e-4, atol=0)


def test_operators_of_linear_operator_itself() -> None:
    ours, dense = Case((), 60, 4).make()
    shipped = LowRankRootAddedDiagLinearOperator(LowRankRootLinearOperator(ours.root), DiagLinearOperator(ours.diag))
    for operator in (shipped, ours + DenseLinearOperator(dense), shipped * 2.0):
        found = logdet(operator, 50, 60, generator=seeded(4))
        truth = torch.logdet(operator.to_dense())
        assert found.num_matvecs == 50 * 60 and 0 < found.standard_error.item() < 3
        assert abs((found.value - truth).item()) < 6.5 * found.standard_error.item()  # 4e-8 by Student's t


def test_matrices_without_a_log_determinant() -> None:
    root = torch.randn(40, 3, generator=seeded(0))
    for given in (matrix("indefinite"), torch.zeros(5, 5), (root @ root.mT).double(), root @ root.mT, -torch.eye(3)):
        with pytest.raises(NotPSDError, match="positive definite to the precision of its dtype; its eigenvalues reach"):
            logdet(given, generator=seeded(0))
    with pytest.raises(NotPSDError, match=r"the diagonal must be > 0 everywhere; got minimum -1"):
        logdet(DiagLinearOperator(torch.tensor([2.0, -1.0])))
    with pytest.raises(NotPSDError, match="its eigenvalues reach"):
        logdet(lambda v: -v, size=4)


def test_bad_arguments() -> None:
    operator = Case((), 9, 2).make()[0]
    with pytest.raises(ShapeError, match=r"the matrix must be \(D, D\) with D >= 1; got \(2, 9, 9\)"):
        logdet(operator.expand(2, 9, 9))
    dense = positive()
    with pytest.raises(ValueError, match="method must be one of auto, exact, slq; got 'lanczos'"):
        logdet(dense, method="lanczos")
    with pytest.raises(ValueError, match="method='exact' needs a matrix whose class knows the answer; got Tensor"):
        logdet(dense, method="exact")
    with pytest.raises(ValueError, match="num_probes must be an integer >= 1; got 0"):
        logdet(dense, 0)
    with pytest.raises(ValueError, match="num_steps must be an integer >= 1; got 0"):
        logdet(dense, 1, 0)
    with pytest.raises(ValueError, match="must be symmetric"):
        logdet(dense.triu() + dense.tril(-1) * 3, generator=seeded(0))
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        logdet(dense * torch.nan)
