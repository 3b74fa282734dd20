"""Spectral densities by stochastic Lanczos quadrature against dense float64 spectra."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg import memory, probing
from lowrank_bdl.linalg.probing import ProbedMatrix
from lowrank_bdl.linalg.spectral_density import SpectralDensity, spectral_density
from tests.allocations import peak_vectors
from tests.linalg.cases import F32, F64, Case
from tests.linalg.estimates import KINDS, SIZE, assert_honest, matrix, seeded, stacked
from tests.oracles import C


def exact_density(values: Tensor, points: Tensor, width: float) -> Tensor:
    bumps = torch.exp(-0.5 * ((points - values[:, None]) / width).square())
    return bumps.mean(0) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("case", [Case((), 60, 4), Case((), 60, 0), Case((), 60, 5, "matrix", F32)], ids=str)
def test_traces_of_functions_of_the_librarys_operator(case: Case) -> None:
    """With D steps each probe's z'f(A)z is exact, and so is their mean; here for the very same probes."""
    operator, dense = case.make()
    values, vectors = torch.linalg.eigh(dense)
    found = spectral_density(operator, 7, 60, generator=seeded(2))
    probes = ProbedMatrix(operator).probes(7, seeded(2)).double()
    for function in (torch.log, torch.sqrt, torch.reciprocal, torch.ones_like):
        forms = ((probes @ vectors).square() * function(values)).sum(-1)
        estimate = found.integrate(function)
        tolerance = 100 * C[case.dtype] * forms.abs().max().item()
        torch.testing.assert_close(estimate.value, forms.mean(), rtol=0, atol=tolerance)
        torch.testing.assert_close(estimate.standard_error, forms.std() / 7**0.5, rtol=0, atol=tolerance)
        assert estimate.num_matvecs == found.num_matvecs <= 7 * 60


@pytest.mark.parametrize("kind", KINDS)
def test_density_on_a_grid(kind: str) -> None:
    """Exact up to the error bars, which count probes, and up to the 3e-4 of the default width, which counts steps."""
    dense = matrix(kind)
    values = torch.linalg.eigvalsh(dense)
    steps = 20
    found = spectral_density(dense, 2000, steps, generator=seeded(3))
    points, density, error = found.density()
    assert points.shape == density.shape == error.shape == (400,) and bool((density >= 0).all())
    width = found.default_width()
    assert width == pytest.approx((values[-1] - values[0]).item() / steps, rel=0.1)
    torch.testing.assert_close(torch.trapezoid(density, points).item(), 1.0, rtol=0, atol=1e-3)
    deviation = (density - exact_density(values, points, width)).abs()
    slack = 3e-4 * density.max()
    # 7 standard errors of 2000 probes: false alarm below 400 * 3e-12
    assert bool((deviation <= 7 * error + slack).all())
    assert not bool((density.sub(exact_density(values, points, 0.8 * width)).abs() <= 7 * error + slack).all())


def test_grid_and_width() -> None:
    found = spectral_density(matrix("indefinite"), 3, 30, generator=seeded(0))
    grid = torch.tensor([-1.0, 0.0, 1.0])
    points, density, error = found.density(grid, width=0.5)
    assert torch.equal(points, grid.double()) and density.shape == error.shape == (3,)
    single = spectral_density(matrix("indefinite"), 1, 30, generator=seeded(0))
    assert bool(single.density(grid)[2].isnan().all()) and bool(single.density(grid)[1].isfinite().all())
    assert bool(single.integrate(torch.square).standard_error.isnan())
    assert len(found.density(5)[0]) == 5
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="width must be > 0 and finite; got"):
            found.density(grid, bad)
    with pytest.raises(ValueError, match="the number of grid points must be an integer >= 1; got 0"):
        found.density(0)
    for constant in (0.0, 3.0):  # one point: some width all the same
        points, density, _ = spectral_density(constant * torch.eye(9), 2, 5, generator=seeded(0)).density(4001)
        torch.testing.assert_close(torch.trapezoid(density, points).item(), 1.0, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "kind, function", [("low rank + diag", torch.log), ("indefinite", torch.tanh), ("hessian", torch.square)]
)
def test_integrals_are_unbiased_with_honest_error_bars(kind: str, function: Callable[[Tensor], Tensor]) -> None:
    dense = matrix(kind, 20)
    truth = function(torch.linalg.eigvalsh(dense)).sum()
    found = spectral_density(dense, 6000, 20, generator=seeded(4))
    names = ("nodes", "weights", "diagonal", "off_diagonal")
    parts = zip(*(getattr(found, name).split(3) for name in names), strict=True)  # 2000 runs of 3 probes
    runs = [replace(found, **dict(zip(names, part, strict=True))).integrate(function) for part in parts]
    values, errors = stacked(runs)
    assert_honest(values, errors, truth)
    for wrong, message in (  # power: a mean off by its own error bar, population variances, no division by sqrt(P)
        ((values + errors.mean(), errors), "bias: "),
        ((values, errors * (2 / 3) ** 0.5), "error bars: "),
        ((values, errors * 3**0.5), "error bars: "),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_honest(*wrong, truth)


def test_too_few_steps_show_in_the_truncation() -> None:
    dense = matrix("wide", 200)
    values, vectors = torch.linalg.eigh(dense)
    probes = ProbedMatrix(dense).probes(50, seeded(0))
    forms = ((probes @ vectors).square() * values.log()).sum(-1).mean()
    previous = math.inf
    for steps in (4, 8, 16, 32, 64, 128):
        estimate = spectral_density(dense, 50, steps, generator=seeded(0)).integrate(torch.log)
        truncation = estimate.truncation.item()
        own = (estimate.value - forms).item()  # the quadrature's error alone, upwards: the probes are the same
        assert 0 < own < (2 if steps < 16 else 1) * truncation < 2 * previous
        previous = truncation
    assert truncation < 0.2 * estimate.standard_error.item()


def test_the_same_generator_gives_the_same_density_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = matrix("low rank + diag")
    whole = spectral_density(dense, 5, 10, generator=seeded(1))
    again = spectral_density(dense, 5, 10, generator=seeded(1))
    assert torch.equal(whole.nodes, again.nodes) and torch.equal(whole.weights, again.weights)
    calls: list[int] = []
    by_function = spectral_density(
        lambda v: dense @ v, 5, 10, size=SIZE, dtype=F64, generator=seeded(1), progress=calls.append
    )
    assert calls == list(range(1, 51)) and by_function.num_matvecs == whole.num_matvecs == 50
    monkeypatch.setattr(probing, "BLOCK_BYTES", 2 * 4 * SIZE * 8)
    blocks = spectral_density(DenseLinearOperator(dense), 5, 10, generator=seeded(1), progress=calls.append)
    assert calls[50:] == [*range(2, 21, 2), *range(22, 41, 2), *range(41, 51)]
    for other in (by_function, blocks):
        torch.testing.assert_close(other.nodes, whole.nodes, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.weights, whole.weights, rtol=0, atol=1e-9)
    other = spectral_density(dense, 5, 10, generator=seeded(2))
    assert not torch.allclose(other.nodes, whole.nodes)


def test_more_steps_than_coordinates_and_one_coordinate() -> None:
    found = spectral_density(matrix("indefinite"), 2, 1000, generator=seeded(0))
    assert found.nodes.shape == (2, SIZE) and isinstance(found, SpectralDensity) and found.size == SIZE
    single = spectral_density(torch.tensor([[-3.0]]), 2, 7, generator=seeded(0))
    assert single.nodes.tolist() == [[-3.0], [-3.0]] and single.weights.tolist() == [[1.0], [1.0]]


def test_memory_holds_no_basis() -> None:
    size = 400_000
    diagonal = torch.linspace(1, 2, size)

    def run(reorthogonalize: bool) -> float:
        return peak_vectors(
            lambda: spectral_density(
                lambda v: diagonal * v, 2, 12, size=size, generator=seeded(0), reorthogonalize=reorthogonalize
            ),
            size,
        )

    assert run(False) < 4.5 and run(True) > 12  # the product is the fourth vector


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = matrix("indefinite")
    with pytest.raises(ValueError, match="num_probes must be an integer >= 1; got 0"):
        spectral_density(dense, 0)
    with pytest.raises(ValueError, match="num_steps must be an integer >= 1; got -1"):
        spectral_density(dense, 1, -1)
    with pytest.raises(ShapeError, match=r"the matrix must be \(D, D\) with D >= 1; got \(40, 39\)"):
        spectral_density(dense[:, 1:])
    with pytest.raises(ValueError, match="a function as matrix needs its size"):
        spectral_density(lambda v: v)
    with pytest.raises(NonFiniteError, match="a product with the matrix holds NaN or infinity"):
        spectral_density(dense * math.nan)
    with pytest.raises(ValueError, match="must be symmetric, and its products repeatable"):
        spectral_density(dense.triu(), generator=seeded(0))
    found = spectral_density(dense, 2, 10, generator=seeded(0))
    with pytest.raises(NonFiniteError, match=r"the function must be finite on the nodes, from -.* to "):
        found.integrate(torch.log)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match="Lanczos quadrature with 14 vectors of 40 a probe needs 0.00 GiB"):
        spectral_density(dense, 2, 10, reorthogonalize=True)
