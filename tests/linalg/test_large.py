"""A million coordinates in float32: accuracy against float64 QR, the law of the draws, and memory.

The oracle is one Householder QR of ``[D^-1/2 (U, x); (I, 0)]`` with rows sorted, float64 throughout: its triangle gives
the log-determinant, and the quadratic form as what the right-hand sides have below the first K rows. It shares no step
with the library's Gram matrices and residuals.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gpytorch
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.allocations import peak_bytes
from tests.statistical import ALPHA, assert_chi_square, chi2

D, K = 1_000_000, 20


@dataclass
class Problem:
    """Rows (K, D) correlated as SWAG's deviations are, a diagonal (D,), and values (2, D): a draw, and any."""

    rows: Tensor
    diag: Tensor
    values: Tensor
    logdet: float = 0.0
    quadratic: Tensor | None = None

    @property
    def operator(self) -> LowRankPlusDiagLinearOperator:
        return LowRankPlusDiagLinearOperator(self.rows.mT, self.diag)


def make(scale: float, clamped: float = 0.0, mass: float = 0.0, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(K, D, generator=g)
    for k in range(1, K):
        rows[k].mul_(0.43).add_(rows[k - 1], alpha=0.9)
    rows *= 1e-2
    diag = (torch.rand(D, generator=g) * 2 - 1).exp_() * scale
    pick = torch.rand(D, generator=g)
    diag[pick < clamped] = 1e-30
    diag[pick < mass] = 0.0
    rows[:, pick < mass] = 0.0
    draw = rows.mT.double() @ torch.randn(K, generator=g).double()
    draw += diag.double().sqrt() * torch.randn(D, generator=g)
    arbitrary = torch.randn(D, generator=g) * 1e-2
    arbitrary[pick < mass] = 0.0
    return Problem(rows, diag, torch.stack((draw.float(), arbitrary)))


def solve(problem: Problem) -> Problem:
    """Fill in the oracle."""
    free = problem.diag > 0
    diag, order = problem.diag[free].double().sort()
    stacked = torch.cat((problem.rows[:, free], problem.values[:, free])).mT[order].double() / diag.sqrt().unsqueeze(-1)
    triangle = torch.zeros(0, K + 2).double()
    for block in (*stacked.split(125_000), torch.eye(K, K + 2).double()):
        triangle = torch.linalg.qr(torch.cat((triangle, block)), mode="r").R
    problem.logdet = (diag.log().sum() + 2 * triangle.diagonal()[:K].abs().log().sum()).item()
    problem.quadratic = triangle[K:, K:].square().sum(0)
    return problem


KINDS = {
    "1e-2": (1e-2,),
    "1e-4": (1e-4,),
    "1e-6": (1e-6,),
    "1e-8": (1e-8,),
    "1e-10": (1e-10,),
    "1e-12": (1e-12,),
    "10% point masses": (1e-6, 0.0, 0.1),
    "29% clamped to 1e-30": (1e-6, 0.29),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def solved(request: pytest.FixtureRequest) -> Iterator[Problem]:
    yield solve(make(*request.param))


@pytest.fixture(scope="module")
def plain() -> Iterator[Problem]:
    yield make(1e-6)


@pytest.fixture(scope="module")
def with_masses() -> Iterator[Problem]:
    yield make(1e-6, 0.0, 0.1, seed=1)


def test_log_determinant_quadratic_form_and_density(solved: Problem) -> None:
    op, quadratic = solved.operator, solved.quadratic
    assert quadratic is not None
    assert abs(op.logdet().item() - solved.logdet) < 0.01
    torch.testing.assert_close(op.inv_quad(solved.values.mT, reduce_inv_quad=False), quadratic, rtol=1e-5, atol=0)
    torch.testing.assert_close(op.inv_quad(solved.values[0]), quadratic[0], rtol=1e-5, atol=0)
    free = int((solved.diag > 0).sum())
    mean = torch.zeros(D)
    for normal in (MultivariateNormal(mean, op), gpytorch.distributions.MultivariateNormal(mean, op)):
        if type(normal) is gpytorch.distributions.MultivariateNormal and free < D:
            continue  # gpytorch counts the point masses as coordinates
        expected = -0.5 * (quadratic + solved.logdet + free * math.log(2 * math.pi))
        torch.testing.assert_close(normal.log_prob(solved.values).double(), expected, rtol=1e-5, atol=0.01)
    entropy = 0.5 * (solved.logdet + free * (1 + math.log(2 * math.pi)))
    assert abs(MultivariateNormal(mean, op).entropy().item() - entropy) < 0.01


def test_solutions_solve(solved: Problem) -> None:
    """``x' S^-1 x`` against the oracle, and symmetry, where the float32 rounding of the solution alone allows it."""
    assert solved.quadratic is not None
    solution = solved.operator.solve(solved.values.mT).double()
    forms = solved.values.double() @ solution
    rounding = 6 * 2**-24 * (solved.values.double().mT * solution).norm(dim=0) / solved.quadratic  # 6 sigma
    checked = rounding < 1e-4
    assert checked[1] and (checked[0] or solved.diag.min() == 1e-30)
    torch.testing.assert_close(forms.diagonal()[checked], solved.quadratic[checked], rtol=1e-4, atol=0)
    assert abs(forms[0, 1] - forms[1, 0]) < 1e-4 * solved.quadratic.max()


def test_point_masses(with_masses: Problem) -> None:
    mass = with_masses.diag == 0
    normal = MultivariateNormal(torch.full((D,), 0.25), with_masses.operator)
    draws = normal.sample(2, generator=torch.Generator().manual_seed(0))
    assert (draws[:, mass] == 0.25).all() and (draws[:, ~mass] != 0.25).any()
    assert normal.log_prob(draws).isfinite().all()
    draws[1, mass.nonzero()[5]] += 1e-6
    assert normal.log_prob(draws)[1] == -math.inf and normal.log_prob(draws[0]).isfinite()


def test_kl_of_equal_distributions_is_zero(plain: Problem, with_masses: Problem) -> None:
    for problem in (plain, with_masses):
        p = MultivariateNormal(torch.zeros(D), problem.operator)
        q = MultivariateNormal(torch.zeros(D), problem.operator.clone())
        assert abs(kl_divergence(p, q).item()) < 1e-6


def test_kl_of_two_distributions(plain: Problem) -> None:
    """Against log-determinants, traces and quadratic forms in float64 by QR, of two problems that share nothing."""
    other = make(3e-6, seed=3)
    shift = plain.values[0] * 0.1
    value = kl_divergence(
        MultivariateNormal(torch.zeros(D), plain.operator), MultivariateNormal(shift, other.operator)
    ).item()
    scale = other.diag.double().sqrt()
    stacked = torch.cat((other.rows, plain.rows, shift.unsqueeze(0))).mT.double() / scale.unsqueeze(-1)
    triangle = torch.zeros(0, 2 * K + 1).double()
    for block in (*stacked.split(125_000), torch.eye(K, 2 * K + 1).double()):
        triangle = torch.linalg.qr(torch.cat((triangle, block)), mode="r").R
    trace_low_rank = triangle[K:, K:].square().sum()  # tr(U_p' S_q^-1 U_p) + d' S_q^-1 d
    ratio = plain.diag.double() / other.diag.double()
    leverage = torch.cat(
        [
            torch.linalg.solve_triangular(triangle[:K, :K].mT, block.mT, upper=False).square().sum(0)
            for block in stacked[:, :K].split(125_000)
        ]
    )
    own = torch.zeros(0, K).double()
    for block in (
        *(plain.rows.mT.double() / plain.diag.double().sqrt().unsqueeze(-1)).split(125_000),
        torch.eye(K).double(),
    ):
        own = torch.linalg.qr(torch.cat((own, block)), mode="r").R
    logdets = 2 * (triangle.diagonal()[:K].abs().log().sum() - own.diagonal().abs().log().sum())
    expected = 0.5 * ((ratio * (1 - leverage)).sum() - D - ratio.log().sum() + trace_low_rank + logdets)
    assert abs(value - expected.item()) < 1e-7 * expected.item()


def test_kl_with_point_masses(plain: Problem, with_masses: Problem) -> None:
    zero = torch.zeros(D)
    both = MultivariateNormal(zero, with_masses.operator), MultivariateNormal(zero, with_masses.operator * 2.0)
    assert 0 < kl_divergence(*both).item() < math.inf
    full = MultivariateNormal(zero, plain.operator)
    assert kl_divergence(full, both[0]).item() == math.inf
    assert kl_divergence(both[0], full).item() == math.inf
    moved = MultivariateNormal(torch.ones(D), with_masses.operator)
    assert kl_divergence(moved, both[0]).item() == math.inf


def test_kl_that_float64_loses_is_refused(plain: Problem) -> None:
    diag = plain.diag[:20_000].clone()
    diag[::3] = 1e-30
    p = MultivariateNormal(torch.zeros(20_000), LowRankPlusDiagLinearOperator(plain.rows[:, :20_000].mT, diag))
    with pytest.raises(NotPSDError, match=r"float64 leaves an error of about .* nat"):
        kl_divergence(p, p)


@pytest.mark.parametrize("shipped", [False, True], ids=["ours", "gpytorch"])
def test_rsample_has_the_right_variance(plain: Problem, shipped: bool) -> None:
    """The draw whitened by the oracle's variances, ``sum r^2 / var``: mean D, and far from gpytorch's own 10^-4."""
    kind = gpytorch.distributions.MultivariateNormal if shipped else MultivariateNormal
    torch.manual_seed(0)  # gpytorch's rsample takes no generator
    draw = kind(torch.zeros(D), plain.operator).rsample().double()
    # x' S^-1 x is chi-square with D degrees of freedom
    value = plain.operator.double().inv_quad(draw).item()
    assert chi2.ppf(ALPHA / 2, D) < value < chi2.isf(ALPHA / 2, D)
    # marginal variances: r_i = d_i + |u_i|^2; with z_2 shared, sum r^2 / var has the mean D and the standard deviation
    # sqrt(2 tr(C^2)), C the correlation matrix, so the low-rank part is measured apart, by its K projections
    whitened = torch.linalg.lstsq(plain.rows.double().mT, draw.unsqueeze(-1)).solution.squeeze(-1)
    assert chi2.ppf(ALPHA / 2, K) < whitened.square().sum().item() < chi2.isf(ALPHA / 2, K)
    residual = draw - plain.rows.double().mT @ whitened
    spread = (residual.square() / plain.diag.double()).sum().item()
    assert chi2.ppf(ALPHA / 2, D - K) < spread < chi2.isf(ALPHA / 2, D)


@pytest.mark.parametrize("scale", [0.01, 0.5, 5.0])
@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_coverage(plain: Problem, scale: float, size: int) -> None:
    """Squared Mahalanobis distances of draws follow chi-square(D); at 1.03 times the deviations they do not."""
    count = 40 if size == 10_000 else 8
    part = LowRankPlusDiagLinearOperator(plain.rows[:, :size].mT, plain.diag[:size]) * scale
    draws = MultivariateNormal(torch.zeros(size), part).sample(count, generator=torch.Generator().manual_seed(7))
    oracle = LowRankPlusDiagLinearOperator(plain.rows[:, :size].double().mT, plain.diag[:size].double()) * scale
    squares = oracle.inv_quad(draws.double().mT, reduce_inv_quad=False)
    assert_chi_square(squares, size)
    with pytest.raises(AssertionError, match="coverage"):
        assert_chi_square(squares * 1.06, size)
    without = LowRankPlusDiagLinearOperator(plain.rows[:, :size].mT, plain.diag[:size]) * (scale * (K - 1))
    wrong = without.sample(count, generator=torch.Generator().manual_seed(7))  # a missing 1 / (rows - 1)
    with pytest.raises(AssertionError, match="coverage"):
        assert_chi_square(oracle.inv_quad(wrong.double().mT, reduce_inv_quad=False), size)


def extra_memory(call: Callable[[], Tensor]) -> float:
    """Return the peak of torch's CPU allocations during the call less those of its result, in units of D K floats."""
    peak, result = peak_bytes(call)
    own = sum(t.untyped_storage().nbytes() for t in (result if isinstance(result, tuple) else (result,)))
    return (peak - own) / (4 * D * K)


def test_memory(plain: Problem) -> None:
    op = plain.operator
    normal = MultivariateNormal(torch.zeros(D), op)
    other = MultivariateNormal(torch.ones(D), plain.operator)
    columns = plain.values[:1].mT
    assert extra_memory(lambda: op._mixed_root()) < 1.01 and extra_memory(lambda: torch.ones(K, D).sum()) > 0.99
    calls: dict[str, Callable[[], Tensor]] = {
        "log_prob": lambda: normal.log_prob(plain.values[0]),
        "log_prob of two": lambda: normal.log_prob(plain.values),
        "rsample": lambda: normal.rsample(),
        "30 samples": lambda: normal.sample(30, generator=torch.Generator().manual_seed(0)),
        "entropy": lambda: MultivariateNormal(torch.zeros(D), plain.operator).entropy(),
        "kl": lambda: kl_divergence(normal, other),
        "solve": lambda: op.solve(columns),
        "matmul": lambda: op @ columns,
        "diagonal": lambda: op.diagonal(),
        "variance": lambda: normal.variance,
        "scaled logdet": lambda: (op * 2.0).logdet(),
        "inverse sample": lambda: op.inverse().sample(4),
        "principal components": lambda: op.principal_components(5)[1],
        "expand": lambda: normal.expand((8,)).log_prob(plain.values[:1]),
    }
    extras = {name: extra_memory(call) for name, call in calls.items()}
    assert not {name: extra for name, extra in extras.items() if not extra < 0.25}
