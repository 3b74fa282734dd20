"""What users of gpytorch and torch do with a distribution and an operator without thinking."""

import io

import gpytorch
import numpy as np
import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.hadamard import RandomizedHadamardLinearOperator
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.linalg.cases import F32, F64, Case
from tests.linalg.operations import columns, no_iterations, plain
from tests.oracles import assert_close


def pair(batch: tuple[int, ...] = (), kind: str = "covariance") -> tuple[MultivariateNormal, Tensor, Tensor]:
    """Return a distribution and the mean and covariance it should have."""
    op, sigma = Case(batch, 7, 3, "matrix").make()
    mean = columns(*batch, 7)
    if kind == "precision":
        return MultivariateNormal(mean, op.inverse()), mean, torch.linalg.inv(sigma)
    return MultivariateNormal(mean, op), mean, sigma


def kronecker() -> KroneckerSpectralLinearOperator:
    left, right = torch.linalg.qr(columns(1, 2, 2)).Q, torch.linalg.qr(columns(1, 3, 3)).Q
    return KroneckerSpectralLinearOperator(left, right, columns(1, 2, 3).abs() + 0.2, result_dtype=F64)


INDICES = [
    *(range(2), np.array([5, 2]), [0, 2], [-1, 3], torch.tensor([4, 1, 0])),
    *(slice(1, 4), slice(None, None, 2), -2, 5),
]


@pytest.mark.parametrize("kind", ["covariance", "precision"])
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_marginals_by_lists_masks_and_integers(index, kind: str) -> None:
    ours, mean, sigma = pair((), kind)
    places = torch.arange(7)[index if isinstance(index, slice | int) else torch.as_tensor(index)].reshape(-1)
    for part in (ours[index], ours[torch.isin(torch.arange(7), places)] if places.diff().gt(0).all() else ours[index]):
        assert type(part) is MultivariateNormal
        assert type(part.lazy_covariance_matrix) is type(ours.lazy_covariance_matrix)
        expected = torch.distributions.MultivariateNormal(mean[places], sigma[places][:, places])
        value = columns(3, len(places))
        assert_close(part.mean, expected.mean)
        assert_close(part.covariance_matrix, sigma[places][:, places], F64, 100)
        assert_close(part.log_prob(value), expected.log_prob(value), F64, 100)
        assert_close(part.entropy(), expected.entropy(), F64, 100)


@pytest.mark.parametrize("kind", ["covariance", "precision"])
def test_indices_of_batches(kind: str) -> None:
    ours, mean, sigma = pair((2, 3), kind)
    one = ours[1, -2, -3]
    assert one.event_shape == (1,) and type(one) is MultivariateNormal
    assert_close(one.mean, mean[1, -2, [-3]])
    assert_close(one.variance, sigma[1, -2, -3, [-3]], F64, 100)
    for index, batch, places in (
        (([0, 1], [2, 0]), ([0, 1], [2, 0]), slice(None)),
        ((1, slice(None), [0, 5]), (1,), [0, 5]),
        ((..., [0, 5]), (), [0, 5]),
        ((1, ..., slice(2, 5)), (1,), slice(2, 5)),
        (([1],), ([1],), slice(None)),
        ((-1,), (-1,), slice(None)),
    ):
        part = ours[index]
        assert type(part) is MultivariateNormal
        chosen, matrix = mean[batch][..., places], sigma[batch][..., places, :][..., places]
        assert_close(part.mean, chosen)
        assert_close(part.covariance_matrix, matrix, F64, 100)
    independent = ours[:, 1, 4]
    assert_close(independent.mean, mean[:, 1, 4])
    assert_close(independent.variance, sigma[:, 1, 4, 4], F64, 100)
    with pytest.raises(IndexError, match="chooses pairs, which have no joint distribution"):
        ours[0, [0, 1], [2, 3]]
    with pytest.raises(IndexError, match="too many indices"):
        ours[0, 0, 0, 0]
    with pytest.raises(IndexError, match=r"None adds no axis to shape \(2, 3, 7\); use unsqueeze\(\)"):
        ours[None, 0, 0]


def test_indices_of_operators_by_lists() -> None:
    op, sigma = Case((), 7, 3).make()
    for matrix, dense in ((op, sigma), (op.inverse(), torch.linalg.inv(sigma)), (kronecker(), kronecker().to_dense())):
        assert_close(matrix[[0, 1], [0, 1]], dense[[0, 1], [0, 1]], F64, 10)
        assert_close(matrix[[0, -1], [2, 3]], dense[[0, -1], [2, 3]], F64, 10)
        assert_close(matrix[[0, 2]][:, [1]].to_dense(), dense[[0, 2]][:, [1]], F64, 10)
        for index in (np.array([3, 0]), range(1, 4), np.array([True, False] * 3 + [True])[: len(dense)], np.int64(2)):
            places = torch.as_tensor(index)
            assert_close(plain(matrix[index]), dense[places], F64, 10)
        assert matrix[[]][:, []].shape == (0, 0)
        with pytest.raises(IndexError, match=r"coordinates must be integers or a mask; got torch\.float32"):
            matrix[[0.5, 1.0]]
        with pytest.raises(IndexError, match="None adds no axis"):
            matrix[None]


@pytest.mark.parametrize("kind", ["covariance", "precision"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_arithmetic(batch: tuple[int, ...], kind: str) -> None:
    ours, mean, sigma = pair(batch, kind)
    other, mean2, sigma2 = pair((), kind)
    for result, m, s in (
        (ours * 2, 2 * mean, 4 * sigma),
        (ours * -0.5, -0.5 * mean, sigma / 4),
        (ours / 4, mean / 4, sigma / 16),
        (ours + 3, mean + 3, sigma),
        (ours + other, mean + mean2, sigma + sigma2),
        (ours.add_jitter(0.25), mean, sigma + 0.25 * torch.eye(7, dtype=F64)),
        (ours.unsqueeze(0), mean[None], sigma[None]),
    ):
        assert type(result) is MultivariateNormal
        assert type(result.lazy_covariance_matrix) is type(ours.lazy_covariance_matrix)
        assert_close(result.mean, m)
        assert_close(result.covariance_matrix, s, F64, 100)


@pytest.mark.parametrize("kind", ["covariance", "precision"])
def test_regions_base_samples_and_independent_distributions(kind: str) -> None:
    ours, mean, sigma = pair((2,), kind)
    std = sigma.diagonal(dim1=-2, dim2=-1).sqrt()
    low, high = ours.confidence_region()
    assert_close(low, mean - 2 * std, F64, 100)
    assert_close(high, mean + 2 * std, F64, 100)
    base = ours.get_base_samples(torch.Size((3,)))
    assert base.shape == (3, 2, 7)
    draws = ours.rsample(torch.Size((3,)), base_samples=base)
    root = ours.lazy_covariance_matrix.root_decomposition().root.to_dense()
    assert_close(draws, mean + (root @ base.unsqueeze(-1)).squeeze(-1))
    independent = ours.to_data_independent_dist()
    assert_close(independent.stddev, std, F64, 100)
    assert independent.batch_shape == (2, 7)


def test_confidence_regions_have_gradients() -> None:
    root, diag = columns(5, 2).requires_grad_(), (columns(5).abs() + 0.1).requires_grad_()
    MultivariateNormal(columns(5), LowRankPlusDiagLinearOperator(root, diag)).confidence_region()[1].sum().backward()
    plain = (diag.detach().requires_grad_(), root.detach().requires_grad_())
    (2 * (plain[0] + plain[1].square().sum(-1)).sqrt()).sum().backward()
    assert_close(diag.grad, plain[0].grad)
    assert_close(root.grad, plain[1].grad)


def test_a_likelihood_adds_its_noise_and_keeps_the_class() -> None:
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.3
    eye = torch.eye(7, dtype=F64)
    for batch in ((), (2,)):
        for kind in ("covariance", "precision"):
            ours, mean, sigma = pair(batch, kind)
            noisy = likelihood(ours)
            assert type(noisy) is MultivariateNormal
            assert type(noisy.lazy_covariance_matrix) is type(ours.lazy_covariance_matrix)
            dense = torch.distributions.MultivariateNormal(mean, sigma + likelihood.noise.detach() * eye)
            assert_close(noisy.log_prob(mean + 0.5), dense.log_prob(mean + 0.5), F64, 100)
    noisy = likelihood(MultivariateNormal(columns(6), kronecker()))
    assert type(noisy.lazy_covariance_matrix) is KroneckerSpectralLinearOperator


@pytest.mark.parametrize("kind", ["Kronecker", "blocks", "sum", "expanded"])
@pytest.mark.parametrize("size", [800, 4])
def test_distributions_of_other_structures(kind: str, size: int) -> None:
    low_rank = Case((), 6, 2).make()[0]
    covariance = {
        "Kronecker": kronecker(),
        "blocks": BlockDiagonalLinearOperator(low_rank, kronecker()),
        "sum": kronecker() + low_rank,
        "expanded": kronecker().expand(3, 6, 6),
    }[kind]
    dense = covariance.to_dense()
    mean = columns(*dense.shape[:-1])
    ours, expected = MultivariateNormal(mean, covariance), torch.distributions.MultivariateNormal(mean, dense)
    values = columns(4, *dense.shape[:-1])
    with no_iterations(size) as calls:
        if kind == "sum" and size == 4:
            for refused in (lambda: ours.log_prob(values), ours.entropy, ours.rsample):
                with pytest.raises(NotImplementedError, match="of a SumOfLinearOperators has no exact form"):
                    refused()
        else:
            assert_close(ours.log_prob(values), expected.log_prob(values), F64, 100)
            assert_close(ours.log_prob(values[0]), expected.log_prob(values[0]), F64, 100)
            assert_close(ours.entropy(), expected.entropy(), F64, 100)
            torch.manual_seed(0)
            draws = ours.sample((4000,))
            spread = (draws - mean).square().mean(0) / ours.variance
            assert (spread - 1).abs().max() < 0.15
        assert_close(ours.variance, expected.variance)
        assert_close((ours + 2)[..., 1:3].mean, mean[..., 1:3] + 2)
    assert not calls


class _Regression(gpytorch.models.ExactGP):
    """Bayesian linear regression as a Gaussian process: its prior covariance is low-rank plus diagonal."""

    def __init__(self, x: Tensor, y: Tensor, likelihood: gpytorch.likelihoods.Likelihood, ours: bool) -> None:
        super().__init__(x, y, likelihood)
        self.ours = ours

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        root, diag = torch.cat([x, x.square(), torch.ones_like(x)], -1), torch.full_like(x[:, 0], 1e-2)
        if self.ours:
            return MultivariateNormal(x[:, 0], LowRankPlusDiagLinearOperator(root, diag))
        covariance = DenseLinearOperator(root @ root.mT + torch.diag(diag))
        return gpytorch.distributions.MultivariateNormal(x[:, 0], covariance)


def test_the_output_of_an_exact_gp() -> None:
    x, y, new = columns(20, 1), columns(20, seed=8), columns(6, 1, seed=9)
    results = []
    for ours in (True, False):
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        model = _Regression(x, y, likelihood, ours).double()
        loss = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model(x), y)
        loss.backward()
        model.eval(), likelihood.eval()
        predicted = likelihood(model(new))
        gradient = likelihood.noise_covar.raw_noise.grad
        results.append((loss, gradient, predicted.mean, predicted.covariance_matrix, predicted.log_prob(columns(6))))
        assert isinstance(predicted, MultivariateNormal) or not ours
    for got, expected in zip(*results, strict=True):
        assert_close(got.detach(), expected.detach(), F64, 1e4)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_operators_load_with_weights_only(dtype: torch.dtype) -> None:
    low_rank = Case((2,), 7, 3, "batch", dtype).make()[0]
    single = Case((), 7, 3, "none", dtype).make()[0]
    for op in (
        low_rank,
        single.expand(3, 7, 7),
        low_rank.inverse(),
        kronecker(),
        kronecker().expand(2, 6, 6),
        BlockDiagonalLinearOperator(single, single.inverse()),
        single * -2,
        single + single.inverse(),
        RandomizedHadamardLinearOperator.random(9, 3, dtype=dtype),
    ):
        buffer = io.BytesIO()
        torch.save({"operator": op}, buffer)
        buffer.seek(0)
        found = torch.load(buffer, weights_only=True)["operator"]
        assert type(found) is type(op) and found.dtype == op.dtype
        torch.testing.assert_close(found.to_dense(), op.to_dense(), rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(torch.load, buffer)  # what is not of this library stays refused
    buffer.seek(0)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(buffer, weights_only=True)


def test_validation_refuses_what_is_no_number() -> None:
    for kind in ("covariance", "precision"):
        ours, _, _ = pair((), kind)
        checked = MultivariateNormal(ours.mean, ours.lazy_covariance_matrix, validate_args=True)
        value = columns(3, 7)
        assert_close(checked.log_prob(value), ours.log_prob(value).double())
        value[1, 2] = torch.nan
        with pytest.raises(ValueError, match="to be within the support"):
            checked.log_prob(value)
        assert ours.log_prob(value).isnan().tolist() == [False, True, False]
        with pytest.raises(ValueError, match="to be within the support"):
            checked.expand((2,)).log_prob(value.unsqueeze(1))
        with pytest.raises(ValueError, match="to be within the support"):
            checked[:3].log_prob(value[:, :3])
