"""Lanczos against dense eigendecompositions, easy and nasty, and the number of products it needs."""

import math

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.lanczos import Eigenpairs, lanczos
from tests.linalg.cases import Case


def matrix(kind: str, size: int = 40) -> Tensor:
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
    start = torch.ones(40).double()
    pairs = lanczos(lambda v: dense @ v, 3, start=start)
    check(pairs, dense, torch.linalg.eigvalsh(dense).flip(0)[:3], torch.float64)
    invariant = torch.zeros(40).double()
    invariant[7] = 1.0  # an eigenvector: the space it spans is invariant
    diagonal = matrix("diagonal")
    check(lanczos(lambda v: diagonal @ v, 2, start=invariant, generator=torch.Generator().manual_seed(0)),
          diagonal, torch.tensor([19.0, 18.0]).double(), torch.float64)  # fmt: skip
    check(lanczos(lambda v: v, 3, start=start, generator=torch.Generator().manual_seed(0)),
          torch.eye(40).double(), torch.ones(3).double(), torch.float64)  # fmt: skip
    assert torch.equal(start, torch.ones(40).double())


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


def spectrum(name: str, size: int = 300) -> Tensor:
    """Eigenvalues of a diagonal operator: for Krylov spaces of random vectors as good as any with this spectrum."""
    extremes, bulk = {
        "cluster": ([10, 9.9, 9.8, 9.7, 9.6, -3, -3.1], (-1, 9)),  # peers: 27 ghosts above 9.55; {10, 10, 10, 10, 9.9}
        "rank 3": ([300, 20, 1, 0], (0, 0)),  # peers: 300 four times, 20 three times
        "indefinite": ([24, 23, 7, -24.3, -20], (-2, 3)),  # peers: negative values turned into 1
        "multiple": ([10, 10, 10, 9.7, 9.7, -5, -5], (-1, 2)),
    }[name]
    return torch.cat((torch.tensor(extremes), torch.linspace(*bulk, size - len(extremes)))).double()


@pytest.mark.parametrize("options", [{}, {"num_basis": 16, "max_matvecs": 2000}, {"block_size": 3, "num_basis": 90}])
@pytest.mark.parametrize("name", ["cluster", "rank 3", "indefinite"])
def test_spectra_on_which_peers_fail(name: str, options: dict[str, int]) -> None:
    values = spectrum(name)
    pairs = lanczos(DiagLinearOperator(values), (5, 2), generator=torch.Generator().manual_seed(0), **options)
    ordered = values.sort(descending=True).values
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues, torch.cat((ordered[:5], ordered[-2:])), rtol=0, atol=1e-9)
    torch.testing.assert_close(pairs.residuals, measured(values, pairs), rtol=1e-6, atol=1e-11)


def measured(values: Tensor, pairs: Eigenpairs) -> Tensor:
    return (values[:, None] * pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0)


@pytest.mark.parametrize("options", [{"confirm": True}, {"block_size": 3}])
def test_multiple_eigenvalues(options: dict[str, int]) -> None:
    values = spectrum("multiple")
    expected = torch.tensor([10, 10, 10, 9.7, 9.7, -5, -5]).double()
    missed = 0
    for seed in range(8):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        single = lanczos(DiagLinearOperator(values), (5, 2), tol=1e-3, generator=generators[0])
        pairs = lanczos(DiagLinearOperator(values), (5, 2), tol=1e-3, generator=generators[1], **options)
        assert pairs.converged.all() and (pairs.eigenvalues - expected).abs().max() < 1e-2
        missed += bool((single.eigenvalues - expected).abs().max() > 1e-2)
    assert missed > 0, "a plain run finds all copies too: the test shows nothing"


@pytest.mark.parametrize("k, products", [((5, 0), 5), ((3, 2), 5), ((0, 1), 1), ((40, 0), 40)])
@pytest.mark.parametrize("kind", ["identity", "zero"])
def test_an_invariant_space_needs_no_product_more(kind: str, k: tuple[int, int], products: int) -> None:
    pairs = lanczos(DenseLinearOperator(matrix(kind)), k, generator=torch.Generator().manual_seed(0))
    assert pairs.num_matvecs == products and pairs.converged.all()
    assert (pairs.eigenvalues - float(kind == "identity")).abs().max() < 1e-14


def test_copies_behind_an_invariant_space_are_proved_to_be_found_or_not_there() -> None:
    """Four values of multiplicity 3, 2, 1 and many: Krylov spaces of 4, 3, 2 and 1 dimensions, and no product more."""
    dense = matrix("clustered")
    found = lanczos(DenseLinearOperator(dense), 4, generator=torch.Generator().manual_seed(0))
    assert found.num_matvecs == 10
    torch.testing.assert_close(found.eigenvalues, torch.tensor([5, 5, 5, 3.0]).double(), rtol=0, atol=1e-12)
    start = torch.linalg.eigh(dense).eigenvectors[:, 20]  # itself invariant: what it does not meet may be there
    one = lanczos(DenseLinearOperator(dense), 1, start=start, generator=torch.Generator().manual_seed(0))
    assert abs(one.eigenvalues.item() - 5) < 1e-12 and one.num_matvecs <= 6
    largest = lanczos(DenseLinearOperator(-dense), 3, "LM", start=start, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(largest.eigenvalues, torch.full((3,), -5.0).double(), rtol=0, atol=1e-12)


def fewest(values: Tensor, start: Tensor, top: int, bottom: int, tol: float) -> int:
    """The least dimension of a Krylov space, from a basis by QR, whose wanted Ritz pairs have small residuals."""
    basis = (start / start.norm())[:, None]
    while True:
        ritz, vectors = torch.linalg.eigh(basis.mT @ (values[:, None] * basis))
        size = len(ritz)
        if size >= top + bottom:
            pick = [*range(bottom), *range(size - top, size)]
            kept = basis @ vectors[:, pick]
            residuals = (values[:, None] * kept - kept * ritz[pick]).norm(dim=0)
            if residuals.max() <= tol * ritz.abs().max():
                return size
        basis = torch.linalg.qr(torch.cat((basis, values[:, None] * basis[:, -1:]), 1)).Q


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_both_ends_take_as_few_products_as_any_krylov_method_can(tol: float) -> None:
    values = torch.cat((10 * 0.85 ** torch.arange(200.0), -3 * 0.8 ** torch.arange(200.0))).double()  # like a Hessian's
    start = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    best = fewest(values, start, 20, 5, tol)
    both = lanczos(DiagLinearOperator(values), (20, 5), tol=tol, start=start)
    ends = [lanczos(DiagLinearOperator(values), k, tol=tol, start=start) for k in ((20, 0), (0, 5))]
    assert both.num_matvecs == best <= 55, (both.num_matvecs, best)
    assert both.converged.all() and both.num_matvecs < sum(one.num_matvecs for one in ends)
    small = lanczos(DiagLinearOperator(values), (20, 5), tol=tol, start=start, num_basis=34)
    assert small.converged.all() and small.num_matvecs <= 1.3 * best
    torch.testing.assert_close(small.eigenvalues, both.eigenvalues, rtol=0, atol=10 * tol)


def test_residuals_hold_what_is_not_symmetric() -> None:
    g = torch.Generator().manual_seed(0)
    dense = matrix("indefinite", 100) + 1e-4 * torch.randn(100, 100, generator=g).double()
    pairs = lanczos(lambda v: dense @ v, 3, start=torch.ones(100).double(), max_matvecs=80, num_basis=30)
    residuals = (dense @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0)
    assert not pairs.converged.any() and residuals.min() > 1e-4
    torch.testing.assert_close(pairs.residuals, residuals, rtol=0.3, atol=0)
    checked = lanczos(lambda v: dense @ v, 3, start=torch.ones(100).double(), max_matvecs=80, num_basis=30, verify=True)
    assert checked.num_matvecs == pairs.num_matvecs + 3
    torch.testing.assert_close(checked.residuals, residuals)


@pytest.mark.parametrize("block_size", [2, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind: str, block_size: int) -> None:
    dense = matrix(kind)
    values = torch.linalg.eigvalsh(dense).flip(0)
    for k in ((3, 2), (39, 0), (20, 20)):
        calls: list[tuple[int, ...]] = []

        def product(columns: Tensor, calls: list[tuple[int, ...]] = calls) -> Tensor:
            calls.append(tuple(columns.shape))
            return dense @ columns

        start = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double()
        pairs = lanczos(
            product, k, start=start, block_size=block_size, generator=torch.Generator().manual_seed(2), max_matvecs=2000
        )
        check(pairs, dense, torch.cat((values[: k[0]], values[40 - k[1] :])), torch.float64)
        assert calls[0] == (40, block_size)
        assert sum(shape[1] if len(shape) == 2 else 1 for shape in calls) == pairs.num_matvecs


def test_dependent_start_vectors_and_products_that_differ_by_rounding() -> None:
    dense = matrix("hessian")
    values = torch.linalg.eigvalsh(dense).flip(0)
    vector = torch.randn(40, 1, generator=torch.Generator().manual_seed(1)).double()
    noise = 1e-13 * torch.randn(40, 1, generator=torch.Generator().manual_seed(3)).double()
    for other in (vector, vector + noise, 1e-20 * vector + noise):
        start = torch.cat((vector, other), 1)
        pairs = lanczos(lambda v: dense @ v, (3, 1), start=start, block_size=2, tol=1e-9)
        check(pairs, dense, torch.cat((values[:3], values[-1:])), torch.float64)


def test_a_basis_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_bdl.linalg.memory.available_memory", lambda device: 1000)
    message = r"the Lanczos basis of 13 vectors of 50 and 1 to work with needs 0\.00 GiB on cpu"
    with pytest.raises(MemoryLimitError, match=message):
        lanczos(DiagLinearOperator(torch.arange(50.0).double()), 1, num_basis=12)
