"""Zero variances under a root, negative variances: exact where the matrix has an inverse, refused where it has not."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, NotPSDError
from lowrank_bdl.linalg.block_scaling import encode_rows
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.linalg.cases import F32, F64
from tests.linalg.operations import columns
from tests.oracles import assert_close, dense


def problem(
    dim: int, rank: int, zeros: list[int], mix: str, dtype: torch.dtype
) -> tuple[LowRankPlusDiagLinearOperator, Tensor]:
    root, diag = columns(rank, dim).to(dtype), (columns(dim, seed=4).abs() + 0.3).to(dtype)
    diag[zeros] = 0
    factor: Tensor | float = {"none": 1.0, "scalar": 0.6}.get(mix, 1.0)
    if mix == "matrix":
        factor = columns(rank, rank, seed=6)
    return LowRankPlusDiagLinearOperator(root.mT, diag, factor), dense(root.mT, diag, factor)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("mix", ["none", "scalar", "matrix"])
@pytest.mark.parametrize(
    ("dim", "rank", "zeros"),
    [(6, 3, [2]), (6, 3, [0, 5]), (6, 3, [1, 2, 4]), (4, 6, [3]), (900, 4, [7, 850]), (1, 1, [0])],
)
def test_solves_and_densities(dim: int, rank: int, zeros: list[int], mix: str, dtype: torch.dtype) -> None:
    op, sigma = problem(dim, rank, zeros, mix, dtype)
    x, mean = columns(dim, 3).to(dtype), columns(dim, seed=9).to(dtype)
    cond = min(torch.linalg.cond(sigma).item(), 9e3)
    expected = torch.linalg.solve(sigma, x.double())
    assert op.solve(x).dtype == dtype
    assert_close(op.solve(x), expected, dtype, cond)
    assert_close(op.solve(x[:, 0], columns(2, dim).to(dtype)), columns(2, dim) @ expected[:, 0], dtype, cond)
    assert_close(op.logdet(), torch.logdet(sigma), dtype, cond)
    assert_close(op.inv_quad(x), (x.double() * expected).sum(), dtype, cond)
    assert_close(op.inverse() @ x, expected, dtype, cond)
    assert_close(op.inverse().solve(x), sigma @ x.double(), dtype, 10)
    ours = MultivariateNormal(mean, op)
    difference = x.mT.double() - mean.double()
    forms = (difference * torch.linalg.solve(sigma, difference.mT).mT).sum(-1)
    log_2pi = torch.log(torch.tensor(2 * torch.pi, dtype=F64))
    assert_close(ours.log_prob(x.mT), -0.5 * (forms + torch.logdet(sigma) + dim * log_2pi), dtype, cond)
    assert_close(ours.entropy(), 0.5 * (torch.logdet(sigma) + dim * (1 + log_2pi)), dtype, cond)
    assert_close(op.expand(2, dim, dim).logdet(), torch.logdet(sigma).expand(2), dtype, cond)
    shifted = torch.linalg.inv(sigma) + 0.2 * torch.eye(dim, dtype=F64)
    assert_close(op.inverse().add_jitter(0.2) @ x, shifted @ x.double(), dtype, cond)


def test_point_masses_beside_zero_variances() -> None:
    root, diag = columns(6, 3), columns(6).abs() + 0.3
    root[1], diag[1], diag[4] = 0, 0, 0
    op, keep = LowRankPlusDiagLinearOperator(root, diag), torch.tensor([0, 2, 3, 4, 5])
    sigma = dense(root[keep], diag[keep])
    value = columns(6)
    value[1] = 0
    expected = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=F64), sigma).log_prob(value[keep])
    ours = MultivariateNormal(torch.zeros(6, dtype=F64), op)
    assert_close(ours.log_prob(value), expected, F64, 100)
    assert ours.log_prob(value + 1) == -torch.inf
    assert op.num_free() == 5


def test_narrow_roots_and_bad_conditioning() -> None:
    rows, diag = columns(3, 9000).float(), columns(9000).abs().float() + 1e-3
    diag[[5, 8999]] = 0
    codes, scale = encode_rows(rows, torch.float16)
    op = LowRankPlusDiagLinearOperator(codes.mT, diag, root_scale=scale)
    root = op._mixed_root().double()
    kept = torch.ones(9000, dtype=torch.bool)
    kept[[5, 8999]] = False
    whole = torch.eye(3, dtype=F64) + (root[kept] / diag[kept, None].double()).mT @ root[kept]
    own = root[~kept] @ torch.linalg.solve(whole, root[~kept].mT)
    expected = diag[kept].double().log().sum() + torch.logdet(whole) + torch.logdet(own)
    assert_close(op.logdet(), expected, F32, 10)


def test_gradients() -> None:
    root, x = columns(5, 3), columns(5)
    diag = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.7], dtype=F64)

    def log_density(root: Tensor, mix: Tensor, x: Tensor) -> Tensor:
        op = LowRankPlusDiagLinearOperator(root, diag, mix)
        return MultivariateNormal(torch.zeros(5, dtype=F64), op).log_prob(x) + op.solve(x).square().sum()

    arguments = [root.requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True), x.requires_grad_()]
    assert torch.autograd.gradcheck(log_density, arguments)
    with pytest.raises(NotImplementedError, match="zero variances under a root that is not zero have no gradient"):
        LowRankPlusDiagLinearOperator(root, diag.clone().requires_grad_()).logdet()


def test_what_is_singular_or_needs_positive_variances_is_refused() -> None:
    diag = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=F64)
    for root in (torch.ones(4, 2), torch.ones(4, 1), columns(4, 1), torch.ones(4, 2) + 1e-15 * columns(4, 2)):
        op = LowRankPlusDiagLinearOperator(root.double(), diag)
        uses = (op.logdet, partial(op.solve, torch.ones(4, 1)), op.inverse().logdet)
        for use in uses:
            with pytest.raises(NotPSDError, match=r"is singular: .* at 2 coordinates of 4 with zero diagonal under a"):
                use()
    op = LowRankPlusDiagLinearOperator(columns(4, 2), diag)
    inverse = MultivariateNormal(torch.zeros(4, dtype=F64), op.inverse())
    for use in (
        lambda: op.root_decomposition().root.to_dense(),
        lambda: op.inverse().diagonal(),
        lambda: inverse[:2],
        lambda: torch.distributions.kl_divergence(inverse, inverse),
        lambda: LowRankPlusDiagLinearOperator(columns(2, 4, 2), diag.expand(2, 4)).logdet(),
    ):
        with pytest.raises(
            NotPSDError, match="needs a positive variance wherever the root is not zero; got [24] coord"
        ):
            use()


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("grad", [False, True])
def test_draws_with_negative_variances_are_refused(grad: bool, dtype: torch.dtype) -> None:
    root = columns(5, 2).to(dtype).requires_grad_(grad)
    for batch in ((), (2,)):
        diag = torch.ones(*batch, 5, dtype=dtype)
        op = LowRankPlusDiagLinearOperator(root, diag)
        assert op.sample(3).isfinite().all()
        diag[..., 2] = -0.5
        draws = (partial(op.sample, 3), partial(op.zero_mean_mvn_samples, 2), MultivariateNormal(diag, op).rsample)
        for draw in draws:
            with pytest.raises(NotPSDError, match=r"the diagonal must be >= 0 everywhere; got \d negative entries"):
                draw()
        diag[..., 2] = torch.nan
        with pytest.raises(NonFiniteError, match=r"the diagonal must be finite everywhere; got \d NaN"):
            op.sample(1)
        diag[..., 2] = 0
        assert op.sample(3).isfinite().all()


def test_the_diagonal_is_looked_at_once() -> None:
    op = LowRankPlusDiagLinearOperator(columns(5, 2), columns(5).abs())
    with torch.profiler.profile() as profile:
        for _ in range(4):
            op.sample(1)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::amin") == 1
    op.logdet()
    op.diag.mul_(2)
    op.logdet()
    with torch.profiler.profile() as profile:
        op.sample(1)
    assert not [event for event in profile.key_averages() if event.key == "aten::amin"]
