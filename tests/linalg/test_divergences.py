"""KL divergences between all kinds of Gaussians against the dense formula in float64."""

import gpytorch
import pytest
import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, LinearOperator
from torch import Tensor
from torch.distributions import kl_divergence

import lowrank_bdl as lb
from lowrank_bdl.errors import NotPSDError, ShapeError
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.linalg.cases import F32, F64, Case
from tests.linalg.operations import columns, no_iterations
from tests.oracles import assert_close

KINDS = [("precision", "precision"), ("covariance", "precision"), ("precision", "covariance")]


def oracle(sigma_p: Tensor, sigma_q: Tensor, mean_p: Tensor, mean_q: Tensor) -> Tensor:
    p, q = (torch.distributions.MultivariateNormal(m, s) for m, s in ((mean_p, sigma_p), (mean_q, sigma_q)))
    return kl_divergence(p, q)


def operator(case: Case, kind: str, seed: int) -> tuple[LinearOperator, Tensor]:
    op, sigma = case.make(seed)
    return (op.inverse(), torch.linalg.inv(sigma)) if kind == "precision" else (op, sigma)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("batches", [((), ()), ((2,), ()), ((), (2,)), ((3, 1), (2,))])
@pytest.mark.parametrize("kinds", KINDS)
def test_covariances_and_precisions(kinds, batches, dtype: torch.dtype) -> None:
    for mix, rank, other in (("none", 3, 2), ("matrix", 3, 0), ("scalar", 0, 4), ("scalar", 9, 9)):
        p, sigma_p = operator(Case(batches[0], 7, rank, mix, dtype), kinds[0], 0)
        q, sigma_q = operator(Case(batches[1], 7, other, "scalar", dtype), kinds[1], 5)
        means = columns(*batches[0], 7).to(dtype), columns(7, seed=9).to(dtype)
        ours = [MultivariateNormal(mean, sigma) for mean, sigma in zip(means, (p, q), strict=True)]
        expected = oracle(sigma_p, sigma_q, means[0].double(), means[1].double())
        for found in (kl_divergence(*ours), lb.kl_divergence(*ours)):
            assert found.dtype == F64
            assert_close(found, expected, dtype, 100)
    same = kl_divergence(ours[0], ours[0])
    assert same.abs().max() < 1e-9 if kinds[0] == kinds[1] else True


@pytest.mark.parametrize("kinds", KINDS)
def test_gradients(kinds) -> None:
    def divergence(root: Tensor, diag: Tensor, other: Tensor, mean: Tensor) -> Tensor:
        p, q = LowRankPlusDiagLinearOperator(root, diag), LowRankPlusDiagLinearOperator(other, diag + 0.5)
        p, q = (s.inverse() if kind == "precision" else s for s, kind in zip((p, q), kinds, strict=True))
        return kl_divergence(MultivariateNormal(mean, p), MultivariateNormal(torch.zeros_like(mean), q))

    arguments = (columns(5, 2), columns(5).abs() + 0.5, columns(5, 1, seed=4), columns(5, seed=7))
    assert torch.autograd.gradcheck(divergence, [argument.requires_grad_() for argument in arguments])


def test_above_800_dimensions_nothing_is_iterated() -> None:
    (p, sigma_p), (q, sigma_q) = Case((), 900, 3).make(), Case((), 900, 2, "scalar").make(5)
    mean = columns(900)
    inverse = torch.linalg.inv
    with no_iterations(800) as calls:
        for left, right, a, b in (
            (p, q, sigma_p, sigma_q),
            (p.inverse(), q.inverse(), inverse(sigma_p), inverse(sigma_q)),
            (p, q.inverse(), sigma_p, inverse(sigma_q)),
            (p.inverse(), q, inverse(sigma_p), sigma_q),
        ):
            ours = MultivariateNormal(mean, left), MultivariateNormal(torch.zeros_like(mean), right)
            assert_close(kl_divergence(*ours), oracle(a, b, mean, torch.zeros_like(mean)), F64, 100)
        plain = gpytorch.distributions.MultivariateNormal(mean, DenseLinearOperator(sigma_p))
        for pair in ((plain, ours[1]), (ours[1], plain)):
            for divergence in (kl_divergence, lb.kl_divergence):
                with pytest.raises(NotImplementedError, match="computed densely only up to 800 dimensions; got 900"):
                    divergence(*pair)
        with pytest.raises(NotImplementedError, match="computed densely only up to 800 dimensions; got 900"):
            lb.kl_divergence(plain, plain)
        diagonal = gpytorch.distributions.MultivariateNormal(mean, DiagLinearOperator(sigma_q.diagonal()))
        expected = oracle(torch.diag(sigma_q.diagonal()), sigma_q, mean, torch.zeros_like(mean))
        assert_close(kl_divergence(diagonal, ours[1]), expected, F64, 100)
    assert not calls


def test_ours_and_gpytorchs() -> None:
    op, sigma = Case((), 7, 3).make()
    mean, zero = columns(7), torch.zeros(7, dtype=F64)
    dense = torch.diag(columns(7).abs() + 1) + 0.1
    theirs = gpytorch.distributions.MultivariateNormal(zero, DenseLinearOperator(dense))
    tensor = gpytorch.distributions.MultivariateNormal(zero, dense)
    for other in (theirs, tensor):
        ours = MultivariateNormal(mean, op)
        assert_close(kl_divergence(ours, other), oracle(sigma, dense, mean, zero), F64, 10)
        assert_close(lb.kl_divergence(other, ours), oracle(dense, sigma, zero, mean), F64, 10)
        assert_close(lb.kl_divergence(other, other), torch.zeros((), dtype=F64) + oracle(dense, dense, zero, zero))
    with pytest.raises(TypeError, match="got MultivariateNormal and Normal"):
        lb.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0))


def test_kronecker_and_block_diagonal_covariances() -> None:
    def kronecker(seed: int) -> KroneckerSpectralLinearOperator:
        left, right = (torch.linalg.qr(columns(1, n, n, seed=seed)).Q for n in (2, 3))
        return KroneckerSpectralLinearOperator(left, right, columns(1, 2, 3, seed=seed).abs() + 0.2, result_dtype=F64)

    def blocks(seed: int) -> BlockDiagonalLinearOperator:
        low_rank = Case((), 7, 3).make(seed)[0]
        return BlockDiagonalLinearOperator(kronecker(seed), low_rank, low_rank.inverse())

    for p, q in ((kronecker(0), kronecker(1)), (blocks(0), blocks(1))):
        means = columns(p.shape[-1]), columns(p.shape[-1], seed=2)
        ours = [MultivariateNormal(mean, sigma) for mean, sigma in zip(means, (p, q), strict=True)]
        with no_iterations(4) as calls:
            assert_close(kl_divergence(*ours), oracle(p.to_dense(), q.to_dense(), *means), F64, 100)
        assert not calls


def test_point_masses_and_lost_digits() -> None:
    root, diag = columns(5, 2), columns(5).abs() + 0.1
    root[1], diag[1] = 0, 0
    sigma = LowRankPlusDiagLinearOperator(root, diag)
    wide = LowRankPlusDiagLinearOperator(root, diag + (torch.arange(5) == 1).double())
    zero, moved = torch.zeros(5, dtype=F64), (torch.arange(5) == 1).double()
    p, q = MultivariateNormal(zero, sigma.inverse()), MultivariateNormal(zero, wide.inverse())
    assert kl_divergence(p, p).abs() < 1e-12
    assert torch.isinf(kl_divergence(p, q)) and torch.isinf(kl_divergence(q, p))
    assert torch.isinf(kl_divergence(p, MultivariateNormal(moved, sigma.inverse())))
    with pytest.raises(NotImplementedError, match="needs positive variances everywhere; got 1 entries"):
        kl_divergence(MultivariateNormal(zero, wide), p)
    twins = torch.ones(5, 2, dtype=F64) * torch.tensor([1e9, 1e9 + 1e-5], dtype=F64)
    far = LowRankPlusDiagLinearOperator(twins, torch.full((5,), 1e-9, dtype=F64))
    with pytest.raises(NotPSDError, match="needs variances that are not too far below the deviations"):
        kl_divergence(MultivariateNormal(zero, far.inverse()), MultivariateNormal(zero, far))
    with pytest.raises(ShapeError, match="KL needs equal dimensions; got 5 and 7"):
        kl_divergence(p, MultivariateNormal(columns(7), Case().make()[0]))
