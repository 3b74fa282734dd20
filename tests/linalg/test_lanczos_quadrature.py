"""Gauss rules from Lanczos coefficients, probe by probe against dense float64 spectra."""

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError
from lowrank_bdl.linalg.lanczos_quadrature import gauss_rule, lanczos_coefficients
from lowrank_bdl.linalg.probing import ProbedMatrix
from tests.linalg.estimates import KINDS, SIZE, matrix, seeded
from tests.oracles import C


def rules(dense: Tensor, steps: int, count: int = 3, reorthogonalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes, weights, and the probes scaled to one."""
    probed = ProbedMatrix(dense)
    starts = probed.probes(count, seeded(1))
    units = starts.double() / len(dense) ** 0.5
    return *gauss_rule(*lanczos_coefficients(probed, starts, steps, reorthogonalize)), units


@pytest.mark.parametrize("reorthogonalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_up_to_twice_the_steps_are_exact(kind: str, dtype: torch.dtype, reorthogonalize: bool) -> None:
    dense = matrix(kind)
    dense = (dense / torch.linalg.matrix_norm(dense, 2)).to(dtype)
    for steps in (1, 2, 5):
        nodes, weights, units = rules(dense, steps, reorthogonalize=reorthogonalize)
        power = units
        for degree in range(2 * steps):
            expected = (units * power).sum(-1)
            actual = (weights * nodes**degree).sum(-1)
            torch.testing.assert_close(actual, expected, rtol=0, atol=10 * C[dtype])
            power = power @ dense.double()
        if steps == 1:  # one degree more is not exact: the test has power
            assert bool((((weights * nodes**2).sum(-1) - (units * power).sum(-1)).abs() > 30 * C[dtype]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_steps_as_coordinates_give_the_spectrum(kind: str) -> None:
    dense = matrix(kind)
    values, vectors = torch.linalg.eigh(dense)
    nodes, weights, units = rules(dense, SIZE, reorthogonalize=True)
    scale = values.abs().max().item()
    torch.testing.assert_close(nodes, values.expand(3, -1), rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(weights, (units @ vectors).square(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_eigenvalues_share_one_weight(kind: str) -> None:
    """Without a basis the nodes come more than once, and functions that vary faster than polynomials are right."""
    dense = matrix(kind)
    values, vectors = torch.linalg.eigh(dense)
    scale = values.abs().max()
    nodes, weights, units = rules(dense, SIZE)
    expected = (units @ vectors).square()
    for function in (lambda x: torch.tanh(5 * x / scale), lambda x: torch.exp(-3 * x / scale)):
        actual = (weights * function(nodes)).sum(-1)
        torch.testing.assert_close(actual, (expected * function(values)).sum(-1), rtol=0, atol=1e-6)


def test_ghosts_only_without_reorthogonalization() -> None:
    dense = matrix("clustered", 400)
    values, vectors = torch.linalg.eigh(dense)
    plain, weights, units = rules(dense, 200)
    kept, kept_weights, _ = rules(dense, 200, reorthogonalize=True)
    assert bool(((plain > 9.55).sum(1) > 5).all()) and bool(((kept > 9.55).sum(1) == 5).all())
    torch.testing.assert_close(kept[:, -5:], values[-5:].expand(3, -1), rtol=1e-12, atol=0)
    expected = (units @ vectors[:, -5:]).square()
    torch.testing.assert_close(kept_weights[:, -5:], expected, rtol=1e-9, atol=0)
    for i, value in enumerate(values[-5:]):
        shared = torch.where((plain - value).abs() < 1e-6, weights, 0.0).sum(1)
        torch.testing.assert_close(shared, expected[:, i], rtol=1e-9, atol=0)


@pytest.mark.parametrize("reorthogonalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_invariant_spaces_end_a_recurrence(dtype: torch.dtype, reorthogonalize: bool) -> None:
    for diagonal, expected in (
        (torch.ones(30), [1.0]),
        (torch.zeros(30), [0.0]),
        ((torch.arange(30) % 3).float() - 1, [-1.0, 0.0, 1.0]),
        (1e-30 * (torch.arange(30) % 2).float(), [0.0, 1e-30]),
    ):
        probed = ProbedMatrix(torch.diag(diagonal).to(dtype))
        coefficients = lanczos_coefficients(probed, probed.probes(4, seeded(0)), 20, reorthogonalize)
        assert probed.num_matvecs == 4 * len(expected)
        nodes, weights = gauss_rule(*coefficients)
        assert nodes.shape == (4, 20) and bool(((weights > 0).sum(1) == len(expected)).all())
        found = nodes[weights > 0].view(4, -1)
        scale = max(expected[-1], 1e-30)
        exact = torch.tensor(expected).double().expand(4, -1)
        torch.testing.assert_close(found / scale, exact / scale, rtol=0, atol=1e-6)
        equal = torch.full_like(found, 1 / len(expected))
        torch.testing.assert_close(weights[weights > 0].view(4, -1), equal, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_recurrences_end_one_by_one(reorthogonalize: bool) -> None:
    """Starts of which each spans another number of eigenvectors; the others go on undisturbed."""
    probed = ProbedMatrix(torch.diag(torch.arange(6.0).double()))
    starts = torch.tril(torch.ones(6, 6).double()).flip(0)
    nodes, weights = gauss_rule(*lanczos_coefficients(probed, starts, 6, reorthogonalize))
    assert probed.num_matvecs == 21
    for i in range(6):
        used = weights[i] > 0
        torch.testing.assert_close(nodes[i][used], torch.arange(6.0 - i).double(), rtol=0, atol=1e-12)
        equal = torch.ones(6 - i).double() / (6 - i)
        torch.testing.assert_close(weights[i][used], equal, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bulk_far_below_one_large_eigenvalue_is_no_end(dtype: torch.dtype) -> None:
    """The second off-diagonal entry is 1e-6 of the norm, a few roundings of float32."""
    diagonal = torch.linspace(1, 2, 200).to(dtype)
    diagonal[0] = 1e6
    nodes, weights, _ = rules(torch.diag(diagonal), 12)
    bulk = torch.where(nodes < 1e5, weights * nodes.clamp(min=0.5).log(), 0.0).sum(1)
    expected = diagonal[1:].double().log().mean() * 199 / 200
    torch.testing.assert_close(bulk, expected.expand(3), rtol={torch.float64: 1e-8, torch.float32: 0.02}[dtype], atol=0)
    one_node = (diagonal[1:].double().mean()).log() * 199 / 200
    assert (one_node - expected) > 0.02 * expected  # what an early end would give


def test_a_function_that_returns_its_argument() -> None:
    probed = ProbedMatrix(lambda v: v, 5, torch.float64)
    nodes, weights = gauss_rule(*lanczos_coefficients(probed, probed.probes(1, seeded(0)), 5))
    assert torch.allclose(nodes[weights > 0], torch.ones(1).double()) and probed.num_matvecs == 1


def test_what_is_not_symmetric_or_not_repeatable_is_refused() -> None:
    dense = matrix("indefinite")
    skewed = dense.clone()
    skewed[0, 1] += 3.0
    noise = seeded(5)
    for given in (
        ProbedMatrix(skewed),
        ProbedMatrix(torch.randn(SIZE, SIZE, generator=seeded(0))),
        ProbedMatrix(lambda v: dense @ v + 0.1 * torch.randn(SIZE, generator=noise).double(), SIZE, torch.float64),
    ):
        with pytest.raises(ValueError, match=r"must be symmetric, and its products repeatable: q'Ap is .* and p'Aq"):
            lanczos_coefficients(given, given.probes(3, seeded(1)), 3)
    for dtype in (torch.float32, torch.bfloat16):  # rounding alone is not taken for it
        rounded = ProbedMatrix(dense.to(dtype))
        nodes, _ = gauss_rule(*lanczos_coefficients(rounded, rounded.probes(3, seeded(1)), 30))
        assert bool(nodes.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite(bad: float) -> None:
    calls = []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return torch.arange(5.0) * v * (bad if len(calls) == 3 else 1.0)

    probed = ProbedMatrix(product, 5)
    with pytest.raises(NonFiniteError, match="or overflows: one of the first 3"):
        lanczos_coefficients(probed, probed.probes(1, seeded(0)), 5)
