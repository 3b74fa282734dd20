"""Stochastic traces and diagonals against dense matrices."""

import math
from collections.abc import Callable

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, LinearOperator, ToeplitzLinearOperator
from scipy.stats import norm
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg import memory
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.linalg.probing import StochasticEstimate
from lowrank_bdl.linalg.stochastic_trace import diagonal, is_structured, trace
from tests.linalg.cases import F32, F64, Case
from tests.linalg.estimates import assert_honest, matrix, seeded, stacked
from tests.oracles import C, assert_close
from tests.statistical import ALPHA


def structured() -> dict[str, LinearOperator]:
    low_rank = Case((), 30, 4).make()[0]
    eye = torch.linalg.qr(torch.randn(1, 5, 5, generator=seeded(0)).double()).Q
    table = torch.rand(1, 5, 5, generator=seeded(1)).double() + 0.1
    diag = DiagLinearOperator(torch.rand(30, generator=seeded(2)).double() + 0.1)
    return {
        "low rank": low_rank,
        "float32": Case((), 30, 5, "matrix", F32).make()[0],
        "inverse": low_rank.inverse(),
        "kronecker": KroneckerSpectralLinearOperator(eye, eye.flip(-1), table, has_bias=False),
        "diag": diag,
        "blocks": BlockDiagonalLinearOperator(low_rank, diag, BlockDiagonalLinearOperator(low_rank.inverse())),
    }


@pytest.mark.parametrize("name", structured())
def test_structured_matrices_are_exact(name: str) -> None:
    operator = structured()[name]
    expected = operator.to_dense().double().diagonal()
    assert is_structured(operator)
    for estimate, truth in ((diagonal(operator), expected), (trace(operator), expected.sum())):
        assert_close(estimate.value, truth, operator.dtype, cond=10)
        assert estimate.num_matvecs == 0 and bool((estimate.standard_error == 0).all())
        assert estimate.standard_error.shape == estimate.value.shape and estimate.truncation.item() == 0
    sampled = trace(operator, 3000, method="hutchinson", generator=seeded(0))
    assert sampled.num_matvecs == 3000
    assert abs((sampled.value - expected.sum()).item()) <= 5.5 * sampled.standard_error.item() + 1e-9  # 4e-8


def test_what_else_is_exact() -> None:
    dense = matrix("indefinite")
    for given in (dense, DenseLinearOperator(dense)):
        assert torch.equal(diagonal(given, method="exact").value, dense.diagonal())
        assert trace(given).num_matvecs == 0 and torch.equal(trace(given).value, dense.diagonal().sum())
    toeplitz = ToeplitzLinearOperator(torch.tensor([2.0, 1.0, 0.0]).double())
    mixed = BlockDiagonalLinearOperator(DiagLinearOperator(torch.ones(2).double()), toeplitz)
    for given in (toeplitz, mixed, lambda v: v):
        size = None if isinstance(given, LinearOperator) else 3
        assert not is_structured(given)
        for function in (trace, diagonal):
            with pytest.raises(ValueError, match="method='exact' needs a matrix whose class knows the answer; got"):
                function(given, method="exact", size=size)
    assert trace(mixed, 30, generator=seeded(0)).num_matvecs == 30


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_hutch_plus_plus_is_exact_up_to_its_rank(rank: int, dtype: torch.dtype) -> None:
    g = seeded(rank)
    root, signs = torch.randn(200, rank, generator=g).double(), torch.sign(torch.randn(rank, generator=g)).double()
    for dense in ((root * signs) @ root.mT, root @ torch.randn(rank, 200, generator=g).double()):  # also not symmetric
        dense = dense.to(dtype)
        truth = dense.double().diagonal().sum()
        found = trace(dense, 30, method="hutch++", generator=g)
        scale = torch.linalg.matrix_norm(dense.double()).item()
        assert found.num_matvecs == 30
        assert abs((found.value - truth).item()) < 10 * C[dtype] * scale
        assert found.standard_error.item() < 10 * C[dtype] * scale
    rough = trace(dense, 30, method="hutchinson", generator=g)
    assert rough.standard_error.item() > 1e-3 * scale  # what the basis saves


ESTIMATORS: dict[str, Callable[[Tensor, torch.Generator], StochasticEstimate]] = {
    "hutchinson": lambda dense, g: trace(dense, 3, method="hutchinson", generator=g),
    "hutch++": lambda dense, g: trace(dense, 9, method="hutch++", generator=g),
    "diagonal": lambda dense, g: diagonal(dense, 3, method="hutchinson", generator=g),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["indefinite", "not symmetric"])
def test_estimates_are_unbiased_with_honest_error_bars(kind: str, estimator: str) -> None:
    dense = torch.randn(15, 15, generator=seeded(0)).double() + 1 if kind == "not symmetric" else matrix(kind, 15)
    truth = dense.diagonal() if estimator == "diagonal" else dense.diagonal().sum()
    g = seeded(6)
    values, errors = stacked([ESTIMATORS[estimator](dense, g) for _ in range(1200)])
    assert_honest(values, errors, truth)
    for wrong, message in (  # power: half an error bar off, population variances, no division by sqrt(3)
        ((values + 0.5 * errors.mean(0), errors), "bias: "),
        ((values, errors * (2 / 3) ** 0.5), "error bars: "),
        ((values, errors * 3**0.5), "error bars: "),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_honest(*wrong, truth)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_variances_are_as_stated(factor: float) -> None:
    """2 sum a_ij² / n for the trace, sum_j a_ij² / n for the diagonal: 10,000 probes; half as much again fails."""
    dense = matrix("indefinite", 15)
    off = dense.square() - torch.diag(dense.diagonal().square())
    number, bound = 10_000, norm.isf(ALPHA / 2 / 16)
    variance = trace(dense, number, method="hutchinson", generator=seeded(0)).standard_error ** 2 * number
    entries = diagonal(dense, number, method="hutchinson", generator=seeded(0)).standard_error ** 2 * number
    stated = torch.cat(((2 * off.sum())[None], off.sum(1))) * factor
    # the kurtosis of a quadratic form in independent signs is at most 15: relative sd of a variance < sqrt(14 / n)
    near = (torch.cat((variance[None], entries)) / stated - 1).abs() < bound * (14 / number) ** 0.5
    assert bool(near.all()) == (factor == 1.0)


def test_hutch_plus_plus_beats_hutchinson_on_a_spectrum_with_large_eigenvalues() -> None:
    dense = matrix("hessian", 200)
    plain = trace(dense, 60, method="hutchinson", generator=seeded(0)).standard_error
    assert trace(dense, 60, method="hutch++", generator=seeded(0)).standard_error < 0.02 * plain


def test_diagonal_matrices_need_one_probe() -> None:
    entries = torch.arange(9.0)
    found = diagonal(lambda v: entries * v, 1, size=9, generator=seeded(0))
    assert torch.equal(found.value, entries.double()) and bool(found.standard_error.isnan().all())
    assert bool(diagonal(lambda v: entries * v, 4, size=9).standard_error.eq(0).all())
    found = trace(lambda v: entries * v, 1, method="hutchinson", size=9)
    assert found.value.item() == 36.0 and bool(found.standard_error.isnan())


def test_functions_operators_and_tensors_agree_and_repeat() -> None:
    dense = matrix("wide")
    for method in ("hutch++", "hutchinson"):
        counts: list[int] = []
        values = [
            trace(dense, 12, method=method, generator=seeded(1)),
            trace(DenseLinearOperator(dense), 12, method=method, generator=seeded(1)),
            trace(lambda v: dense @ v, 12, method=method, size=40, dtype=F64, generator=seeded(1)),
            trace(dense, 12, method=method, generator=seeded(1), progress=counts.append),
        ]
        assert torch.equal(values[0].value, values[3].value) and counts[-1] == values[0].num_matvecs == 12
        for other in values[1:]:
            torch.testing.assert_close(other.value, values[0].value)
            torch.testing.assert_close(other.standard_error, values[0].standard_error)
    first = diagonal(dense, 12, method="hutchinson", generator=seeded(1))
    second = diagonal(lambda v: dense @ v, 12, size=40, dtype=F64, generator=seeded(1))
    torch.testing.assert_close(first.value, second.value)
    assert first.value.shape == first.standard_error.shape == (40,) and first.num_matvecs == 12


def test_fewer_coordinates_than_products() -> None:
    dense = matrix("indefinite")[:4, :4]
    found = trace(dense, 60, method="hutch++", generator=seeded(0))
    assert_close(found.value, dense.diagonal().sum(), cond=10)
    assert found.standard_error.item() < 1e-14 and found.num_matvecs == 60


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = matrix("indefinite")
    product = dense.matmul
    for method, least in (("hutch++", 3), ("hutchinson", 1)):
        with pytest.raises(ValueError, match=f"num_matvecs must be an integer >= {least}; got {least - 1}"):
            trace(product, least - 1, method=method, size=40)
    with pytest.raises(ValueError, match="num_probes must be an integer >= 1; got 0"):
        diagonal(product, 0, size=40)
    with pytest.raises(ValueError, match=r"method must be one of auto, exact, hutch\+\+, hutchinson; got 'XTrace'"):
        trace(dense, method="XTrace")
    with pytest.raises(ValueError, match=r"method must be one of auto, exact, hutchinson; got 'hutch\+\+'"):
        diagonal(dense, method="hutch++")
    for function in (trace, diagonal):
        with pytest.raises(ShapeError, match=r"the matrix must be \(D, D\) with D >= 1; got \(40, 39\)"):
            function(dense[:, 1:])
        with pytest.raises(ValueError, match="a function as matrix needs its size"):
            function(product)
        for bad in (math.nan, math.inf):
            for given in (dense * bad, (dense * bad).matmul):
                size = None if isinstance(given, Tensor) else 40
                with pytest.raises(NonFiniteError, match="a product with the matrix holds NaN or infinity"):
                    function(given, 9, size=size, dtype=None if size is None else F64)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match="the basis of Hutch.., 20 vectors of 40, needs 0.00 GiB on cpu"):
        trace(product, size=40, dtype=F64)
    with pytest.raises(MemoryLimitError, match="a block of probes of 4,000 needs 0.00 GiB on cpu"):
        diagonal(lambda v: v, size=4000)
