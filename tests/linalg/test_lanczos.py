"""Lanczos against dense eigendecompositions, easy and nasty."""

import math

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.lanczos import Eigenpairs, lanczos
from tests.linalg.cases import Case


def matrix(kind: str, size: int = 60) -> Tensor:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=g).double()).Q
    values = {
        "indefinite": torch.randn(size, generator=g).double(),
        "diagonal": torch.arange(size).double() - 20,
        "clustered": torch.cat((torch.full((size - 6,), 1e-3), torch.tensor([5, 5, 5, -4, -4, 3.0]))).double(),
        "identity": torch.ones(size).double(),
        "rank 3": torch.cat((torch.zeros(size - 3), torch.tensor([2.0, 1.0, 0.5]))).double(),
        "zero": torch.zeros(size).double(),
        "tiny": 1e-9 * torch.randn(size, generator=g).double(),
        "hessian": torch.cat((1e-4 * torch.randn(size - 4, generator=g), torch.tensor([100, 30, 10, -5.0]))).double(),
    }[kind]
    return torch.diag(values) if kind in ("diagonal", "identity") else basis @ torch.diag(values) @ basis.mT


KINDS = ["indefinite", "diagonal", "clustered", "identity", "rank 3", "zero", "tiny", "hessian"]


def check(pairs: Eigenpairs, dense: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = dense.abs().max().item()
    loose = {torch.float64: 1e-8, torch.float32: 1e-4}[dtype]
    assert pairs.converged.all() and pairs.eigenvalues.dtype == pairs.residuals.dtype == torch.float64
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=0, atol=loose * scale)
    vectors = pairs.eigenvectors.double()
    assert pairs.eigenvectors.dtype == dtype and vectors.shape == (len(dense), len(expected))
    gram = vectors.mT @ vectors - torch.eye(len(expected)).double()
    assert gram.numel() == 0 or gram.abs().max() < 1e-5
    residuals = (dense @ vectors - vectors * pairs.eigenvalues).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-3, atol=loose * scale * 1e-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE", "pair", "near D", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_a_dense_decomposition(kind: str, which: str, dtype: torch.dtype) -> None:
    dense = matrix(kind).to(dtype).double()
    values = torch.linalg.eigvalsh(dense).flip(0)
    size = len(values)
    k: int | tuple[int, int] = {"pair": (3, 2), "near D": size - 1, "all": size}.get(which, 5)
    expected = {
        "LA": values[:5],
        "SA": values[-5:],
        "LM": values[values.abs().argsort(descending=True)[:5]].sort(descending=True).values,
        "BE": torch.cat((values[:3], values[-2:])),
        "pair": torch.cat((values[:3], values[-2:])),
        "near D": values[:-1],
        "all": values,
    }[which]
    pairs = lanczos(
        DenseLinearOperator(dense.to(dtype)),
        k,
        which if len(which) == 2 else "LA",
        generator=torch.Generator().manual_seed(1),
    )
    check(pairs, dense, expected, dtype)


def test_callables_and_start_vectors() -> None:
    dense = matrix("indefinite")
    start = torch.ones(60).double()
    pairs = lanczos(lambda v: dense @ v, 3, start=start)
    check(pairs, dense, torch.linalg.eigvalsh(dense).flip(0)[:3], torch.float64)
    invariant = torch.zeros(60).double()
    invariant[7] = 1.0  # an eigenvector: the space it spans is invariant
    diagonal = matrix("diagonal")
    check(lanczos(lambda v: diagonal @ v, 2, start=invariant, generator=torch.Generator().manual_seed(0)),
          diagonal, torch.tensor([39.0, 38.0]).double(), torch.float64)  # fmt: skip
    check(lanczos(lambda v: v, 3, start=start, generator=torch.Generator().manual_seed(0)),
          torch.eye(60).double(), torch.ones(3).double(), torch.float64)  # fmt: skip
    assert torch.equal(start, torch.ones(60).double())


@pytest.mark.parametrize("k, which", [(1, "LA"), (1, "SA"), (1, "BE"), ((0, 1), "LA"), (0, "LA"), ((0, 0), "LA")])
def test_one_dimension(k, which) -> None:
    dense = torch.tensor([[-3.0]]).double()
    count = sum(k) if isinstance(k, tuple) else k
    pairs = lanczos(DenseLinearOperator(dense), k, which)
    check(pairs, dense, torch.full((count,), -3.0).double(), torch.float64)


def test_the_same_generator_gives_the_same_pairs() -> None:
    op, _ = Case((), 50, 4).make()
    a, b = (lanczos(op, 3, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.eigenvectors, b.eigenvectors)
    state = torch.random.get_rng_state()
    lanczos(op, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("constant", [1e-30, 1e-9, 1e9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tolerances_are_relative(constant: float, dtype: torch.dtype) -> None:
    dense = matrix("indefinite").to(dtype) * constant
    pairs = lanczos(DenseLinearOperator(dense), 3, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.eigvalsh(dense.double()).flip(0)[:3]
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=1e-4, atol=0)


def test_too_few_products_are_reported_and_not_hidden() -> None:
    dense = matrix("indefinite", 300)
    pairs = lanczos(DenseLinearOperator(dense), 5, max_matvecs=8, generator=torch.Generator().manual_seed(0))
    assert not pairs.converged.all() and pairs.num_matvecs == 8
    residuals = (dense @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, residuals)


def test_bad_arguments() -> None:
    op = DenseLinearOperator(torch.eye(4))
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="product 1 with the operator holds NaN or infinity"):
            lanczos(lambda v, bad=bad: v * bad, 2, start=torch.ones(4))
        with pytest.raises(NonFiniteError, match="the start vector must be finite"):
            lanczos(op, 2, start=torch.full((4,), bad))
    with pytest.raises(ShapeError, match=r"k must be between 0 and D = 4 in all; got 5"):
        lanczos(op, 5)
    with pytest.raises(ShapeError, match=r"got \(3, 2\)"):
        lanczos(op, (3, 2))
    with pytest.raises(ShapeError, match=r"operator must be \(D, D\); got \(2, 4, 4\)"):
        lanczos(DenseLinearOperator(torch.eye(4).expand(2, 4, 4)), 1)
    with pytest.raises(
        ShapeError, match=r"start must be a vector of the size of the operator, .* s <= 1, .*; got \(3,\)"
    ):
        lanczos(op, 1, start=torch.ones(3))
    with pytest.raises(ValueError, match="which must be one of LA, SA, LM, BE; got 'XX'"):
        lanczos(op, 1, "XX")
    with pytest.raises(ValueError, match="needs a start vector"):
        lanczos(lambda v: v, 1)
    with pytest.raises(ValueError, match="start vector must not be zero"):
        lanczos(op, 1, start=torch.zeros(4))
    with pytest.raises(ValueError, match=r"2 pairs need num_basis >= 3 and max_matvecs >= 2; got 2 and None"):
        lanczos(op, 2, num_basis=2)
    with pytest.raises(ValueError, match="got None and 1"):
        lanczos(op, 2, max_matvecs=1)


def test_a_basis_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_bdl.linalg.memory.available_memory", lambda device: 1000)
    message = r"the Lanczos basis of 13 vectors of 50 and 2 to work with needs 0\.00 GiB on cpu"
    with pytest.raises(MemoryLimitError, match=message):
        lanczos(DiagLinearOperator(torch.arange(50.0).double()), 1, num_basis=12)
