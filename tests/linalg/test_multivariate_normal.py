"""The distribution against torch's dense one, and the law of every sampler on its full covariance."""

import gpytorch
import pytest
import torch
from torch.distributions import kl_divergence

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.linalg.cases import F32, F64, FEW, Case
from tests.oracles import assert_close
from tests.statistical import assert_gaussian


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(case: Case, seed: int = 0) -> tuple[MultivariateNormal, torch.distributions.MultivariateNormal]:
    op, sigma = case.make(seed)
    mean = case.columns(*case.batch, case.dim, seed=seed + 20)
    return MultivariateNormal(mean, op), torch.distributions.MultivariateNormal(mean.double(), sigma)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_density_entropy_moments_and_divergence(case: Case) -> None:
    ours, dense = pair(case)
    other, dense_other = pair(case, seed=1)
    values = case.columns(4, *case.batch, case.dim)
    assert_close(ours.log_prob(values), dense.log_prob(values.double()), case.dtype, 100)
    assert_close(ours.log_prob(values[0]), dense.log_prob(values[0].double()), case.dtype, 100)
    assert_close(ours.entropy(), dense.entropy(), case.dtype, 100)
    assert_close(ours.variance, dense.variance, case.dtype)
    assert_close(ours.stddev, dense.stddev, case.dtype)
    lower, upper = ours.confidence_region()
    assert_close(upper - lower, 4 * dense.stddev, case.dtype, 10)
    assert_close(kl_divergence(ours, other), kl_divergence(dense, dense_other), case.dtype, 1e3)
    assert abs(kl_divergence(ours, ours)).max() < 1e-9
    wide, dense_wide = ours.expand((5, *case.batch)), dense.expand((5, *case.batch))
    five = case.columns(5, *case.batch, case.dim)
    assert wide.batch_shape == (5, *case.batch)
    assert_close(wide.log_prob(five), dense_wide.log_prob(five.double()), case.dtype, 100)
    assert_close(wide.entropy(), dense_wide.entropy(), case.dtype, 100)
    assert wide.rsample((2,)).shape == (2, 5, *case.batch, case.dim)
    plain = gpytorch.distributions.MultivariateNormal(ours.loc, ours.lazy_covariance_matrix)
    assert_close(plain.log_prob(values), dense.log_prob(values.double()), case.dtype, 100)


def test_variances_are_not_floored() -> None:
    op = LowRankPlusDiagLinearOperator(torch.zeros(3, 1), torch.full((3,), 1e-12))
    assert_close(MultivariateNormal(torch.zeros(3), op).variance, torch.full((3,), 1e-12).double(), F32)


@pytest.mark.parametrize("shape, expected", [
    (3, (3,)), ([2, 3], (2, 3)), ((2,), (2,)), (torch.Size([0]), (0,)), (torch.Size(), ()), (0, (0,)),
])  # fmt: skip
@pytest.mark.parametrize("batch", [(), (2,)])
def test_sample_shapes(shape, expected, batch) -> None:
    ours, _ = pair(Case(batch))
    for draws in (ours.sample(shape, generator=generator()), ours.rsample(shape, generator=generator())):
        assert draws.shape == (*expected, *batch, 7)
    inverse = MultivariateNormal(ours.loc, ours.lazy_covariance_matrix.inverse())
    assert inverse.sample(shape).shape == (*expected, *batch, 7)


@pytest.mark.parametrize("kind", ["plain", "scaled", "matrix", "rank above dim", "narrow"])
@pytest.mark.parametrize("way", ["sample", "operator", "expanded", "rsample", "zero_mean", "inverse", "inverse rsample",
                                 "gpytorch", "eye"])  # fmt: skip
def test_draws_have_the_mean_and_the_full_covariance(kind: str, way: str) -> None:
    """Each call fails a correct sampler once in a million seeds."""
    case = {"plain": Case((), 6, 3), "scaled": Case((), 6, 3, "scalar"), "matrix": Case((), 6, 3, "matrix"),
            "rank above dim": Case((), 4, 6), "narrow": Case((), 6, 3, "matrix", F32, torch.float16)}[kind]  # fmt: skip
    op, sigma = case.make()
    mean, count = case.columns(case.dim), 4000
    if "rsample" in way:
        op = LowRankPlusDiagLinearOperator(op.root, op.diag.clone().requires_grad_(), op.mix, root_scale=op.root_scale)
    normal = MultivariateNormal(mean, op)
    if way == "eye":  # the exact linear map: no draws
        draws = normal.rsample(base_samples=torch.eye(case.dim, dtype=case.dtype)) - mean
        assert_close(draws.mT @ draws, sigma, case.dtype, 100)
        return
    if way in ("gpytorch", "zero_mean"):
        torch.manual_seed(0)
    draws = {
        "sample": lambda: normal.sample(count, generator=generator()),
        "operator": lambda: op.sample(count, generator(), mean),
        "expanded": lambda: normal.expand((2,)).sample(count // 2, generator=generator()).flatten(0, 1),
        "rsample": lambda: normal.rsample(count, generator=generator()).detach(),
        "zero_mean": lambda: op.zero_mean_mvn_samples(count) + mean,
        "inverse": lambda: op.inverse().sample(count, generator(), mean),
        "inverse rsample": lambda: op.inverse().sample(count, generator(), mean).detach(),
        "gpytorch": lambda: gpytorch.distributions.MultivariateNormal(mean, op).rsample(torch.Size([count])),
    }[way]()
    covariance = torch.linalg.inv(sigma) if "inverse" in way else sigma
    assert_gaussian(draws, mean.double(), covariance)
    with pytest.raises(AssertionError, match="covariance"):
        assert_gaussian(mean + 1.1 * (draws - mean), mean.double(), covariance)


def test_the_law_has_power_against_the_usual_mistakes() -> None:
    case = Case((), 6, 3)
    op, sigma = case.make()
    zero = torch.zeros(6).double()
    wrong = {
        "a dropped cross-layer covariance": torch.cat(
            (op[:3, :3].sample(4000, generator()), op[3:, 3:].sample(4000, generator(1))), dim=-1
        ),
        "a missing 1 / (rows - 1)": LowRankPlusDiagLinearOperator(op.root, op.diag, 2**0.5).sample(4000, generator()),
        "standard deviations for variances": LowRankPlusDiagLinearOperator(op.root, op.diag.sqrt()).sample(
            4000, generator()
        ),
        "a shared z": op.root.mT.mul(1.0).mT @ torch.ones(3).double()
        + op.diag.sqrt() * torch.randn(4000, 6, generator=generator()),
    }
    for draws in wrong.values():
        with pytest.raises(AssertionError, match="covariance|mean"):
            assert_gaussian(draws, zero, sigma)


@pytest.mark.parametrize("shipped", [False, True])
def test_draws_above_the_size_where_gpytorch_turns_to_lanczos(shipped: bool) -> None:
    op, sigma = Case((), 1200, 3).make()
    torch.manual_seed(0)
    kind = gpytorch.distributions.MultivariateNormal if shipped else MultivariateNormal
    draws = kind(torch.zeros(1200).double(), op).rsample(torch.Size([3000]))
    directions = torch.linalg.qr(torch.cat((op.root, Case().columns(1200, 3)), dim=-1)).Q
    assert_gaussian(draws @ directions, torch.zeros(6).double(), directions.mT @ sigma @ directions)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("expanded", [False, True])
def test_streams(batch, expanded) -> None:
    op, _ = Case(batch, mix="matrix").make()
    mean = Case().columns(*batch, 7)
    normal = MultivariateNormal(mean, op)
    learned = MultivariateNormal(mean, LowRankPlusDiagLinearOperator(op.root, op.diag.clone().requires_grad_(), op.mix))
    if expanded:
        normal, learned = normal.expand((3, *batch)), learned.expand((3, *batch))
    before = torch.random.get_rng_state()
    first = normal.sample((4,), generator=generator(5))
    assert torch.equal(first, normal.sample((4,), generator=generator(5)))
    assert not torch.equal(first, normal.sample((4,), generator=generator(6)))
    torch.testing.assert_close(learned.rsample((4,), generator=generator(5)).detach(), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.reshape(-1, 7).unique(dim=0).shape[0] == first.numel() // 7  # no draw twice


@pytest.mark.parametrize("index", [slice(1, 4), torch.tensor([5, 0, 2]), (..., slice(2, 6))], ids=str)
def test_marginals_keep_the_structure(index) -> None:
    ours, dense = pair(Case(mix="matrix"))
    part = ours[index]
    last = index[-1] if isinstance(index, tuple) else index
    assert type(part.lazy_covariance_matrix) is LowRankPlusDiagLinearOperator
    assert_close(part.covariance_matrix, dense.covariance_matrix[last][:, last], F64)
    assert_close(part.mean, dense.mean[last], F64)


def test_batch_entries_and_arithmetic() -> None:
    ours, dense = pair(Case((2, 3)))
    assert_close(ours[1].covariance_matrix, dense.covariance_matrix[1], F64)
    assert_close(ours[1, 2].covariance_matrix, dense.covariance_matrix[1, 2], F64)
    assert_close(ours[1, :, 1:3].covariance_matrix, dense.covariance_matrix[1, :, 1:3, 1:3], F64)
    assert type(ours + ours) is MultivariateNormal
    assert_close((ours + ours).covariance_matrix, 2 * dense.covariance_matrix, F64)
    assert_close((ours * 2).variance, 4 * dense.variance, F64)


def test_bad_arguments() -> None:
    ours, _ = pair(Case())
    with pytest.raises(ShapeError, match=r"mean must be \(\*B, 7\); got \(6,\)"):
        MultivariateNormal(torch.zeros(6), ours.lazy_covariance_matrix)
    with pytest.raises(ShapeError, match=r"a covariance needs a square matrix; got shape \(7, 3\)"):
        MultivariateNormal(torch.zeros(7), ours.lazy_covariance_matrix[:, :3])
    with pytest.raises(TypeError, match="must be a linear operator, such as .* got Tensor"):
        MultivariateNormal(torch.zeros(7), torch.eye(7))
    with pytest.raises(ShapeError, match=r"value must be \(\.\.\., 7\); got \(6,\)"):
        ours.log_prob(torch.zeros(6).double())
    with pytest.raises(ShapeError, match="KL needs equal dimensions; got 7 and 6"):
        kl_divergence(ours, pair(Case((), 6, 2))[0])


@pytest.mark.parametrize("case", FEW, ids=str)
def test_gaussians_given_by_their_precision(case: Case) -> None:
    op, sigma = case.make()
    covariance = torch.linalg.inv(sigma)
    mean, x = case.columns(*case.batch, case.dim), case.columns(*case.batch, case.dim, 2)
    inverse = op.inverse()
    assert_close(inverse.diagonal(), covariance.diagonal(dim1=-2, dim2=-1), case.dtype, 100)
    assert_close(inverse @ x, covariance @ x.double(), case.dtype, 100)
    assert_close(inverse.solve(x), sigma @ x.double(), case.dtype, 10)
    assert_close(inverse.logdet(), -torch.logdet(sigma), case.dtype, 100)
    assert_close(inverse.to_dense(), covariance, case.dtype, 100)
    value, logdet = inverse.inv_quad_logdet(x, logdet=True, reduce_inv_quad=False)
    assert_close(value, (x.double() * (sigma @ x.double())).sum(-2), case.dtype, 10)
    assert_close(logdet, -torch.logdet(sigma), case.dtype, 100)
    assert inverse.inverse() is op
    ours = MultivariateNormal(mean, inverse)
    dense = torch.distributions.MultivariateNormal(mean.double(), covariance)
    values = case.columns(3, *case.batch, case.dim)
    assert_close(ours.log_prob(values), dense.log_prob(values.double()), case.dtype, 100)
    assert_close(ours.entropy(), dense.entropy(), case.dtype, 100)
    assert ours.expand((4, *case.batch)).sample((2,)).shape == (2, 4, *case.batch, case.dim)
    assert_close(op.expand(4, *op.shape).inverse().diagonal()[2], inverse.diagonal().double(), case.dtype)


def test_one_coordinate() -> None:
    g = torch.Generator().manual_seed(0)
    root, diag, mean = (
        torch.randn(2, 5, 2, generator=g),
        torch.rand(2, 5, generator=g) + 0.1,
        torch.randn(2, 5, generator=g),
    )
    one = MultivariateNormal(mean[0], LowRankPlusDiagLinearOperator(root[0], diag[0]))
    for index in (1, -1):
        assert one[index].event_shape == (1,)
        torch.testing.assert_close(one[index].mean, mean[0][[index]])
        torch.testing.assert_close(one[index].variance, one.variance[[index]])
        batch = MultivariateNormal(mean, LowRankPlusDiagLinearOperator(root, diag))
        torch.testing.assert_close(batch[..., index].mean, mean[:, index])
        torch.testing.assert_close(batch[..., index].variance, batch.variance[:, index])
    with pytest.raises(IndexError, match="out of range"):
        one[5]
