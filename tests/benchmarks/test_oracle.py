"""The float64 answers agree with dense algebra; the test of draws has a false-alarm rate and power."""

import torch

from benchmarks.oracle import Oracle, kl_divergence
from benchmarks.problems import GaussianProblem, Size
from tests.oracles import assert_close, dense


def problem(rank: int = 3, seed: int = 0) -> GaussianProblem:
    return GaussianProblem(Size(200, rank, "float64", seed=seed))


def normal(p: GaussianProblem, diag: torch.Tensor, mean: torch.Tensor) -> torch.distributions.MultivariateNormal:
    return torch.distributions.MultivariateNormal(mean, dense(p.storage.mT, diag))


def test_scalars_agree_with_dense_algebra() -> None:
    p = problem()
    exact = normal(p, p.diag, p.mean)
    found = torch.tensor([p.oracle.log_prob(p.value), p.oracle.logdet(), p.oracle.entropy()], dtype=torch.float64)
    covariance = dense(p.storage.mT, p.diag)
    assert_close(found, torch.stack((exact.log_prob(p.value), covariance.logdet(), exact.entropy())), cond=100)


def test_kl_agrees_with_dense_algebra() -> None:
    p = problem()
    q = Oracle(p.storage, p.other_diag, p.other_mean)
    exact = torch.distributions.kl_divergence(normal(p, p.diag, p.mean), normal(p, p.other_diag, p.other_mean))
    assert_close(torch.tensor(kl_divergence(p.oracle, q), dtype=torch.float64), exact, cond=1e4)


def test_errors_vanish_for_dense_answers_and_not_for_wrong_ones() -> None:
    p = problem()
    covariance = dense(p.storage.mT, p.diag)
    solution = torch.linalg.solve(covariance, p.rhs)
    assert p.oracle.solve_error(p.rhs, solution) < 1e-10 < 0.009 < p.oracle.solve_error(p.rhs, 1.01 * solution)
    assert (
        p.oracle.diagonal_error(covariance.diagonal())
        < 1e-12
        < 0.009
        < p.oracle.diagonal_error(covariance.diagonal() * 1.01)
    )
    left, singular, _ = torch.linalg.svd(p.storage.mT, full_matrices=False)
    right = p.oracle.components_errors(singular.square(), left.mT)
    assert max(right.values()) < 1e-9
    wrong = p.oracle.components_errors(singular.square(), left.mT.roll(1, dims=0))
    assert wrong["residual"] > 0.01
    root, diag = p.storage.mT.clone().requires_grad_(), p.diag.clone().requires_grad_()
    sigma = root @ root.mT + torch.diag(diag)
    torch.distributions.MultivariateNormal(p.mean, sigma).log_prob(p.value).backward()
    assert root.grad is not None and diag.grad is not None
    assert max(p.oracle.gradient_errors(p.value, root.grad.mT, diag.grad)) < 1e-9
    assert p.oracle.gradient_errors(p.value, 1.01 * root.grad.mT, diag.grad)[0] > 0.009


def test_right_draws_pass_and_wrong_ones_fail() -> None:
    # a right sampler fails each of two tests with probability 2e-9
    p = problem()
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(30, 200, generator=generator, dtype=torch.float64)
    z2 = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    draws = p.mean + z1 * p.diag.sqrt() + z2 @ p.storage
    assert p.oracle.sample_check(draws).ok
    assert not p.oracle.sample_check(p.mean + 1.2 * (draws - p.mean)).ok  # a wrong scale
    assert not p.oracle.sample_check(p.mean + z1 * p.diag.sqrt()).ok  # no low-rank part
    assert not p.oracle.sample_check(p.mean + z2 @ p.storage).ok  # no diagonal part
    assert not p.oracle.sample_check(draws - p.mean + 0.01).ok  # a wrong mean


def test_chi_square_of_draws_is_uniform_in_size() -> None:
    # the mean over 200 single draws of log(tail) / log(false alarm) for uniform tails in (0, 1/2): (1 + log 2) / 20.7
    total = 0.0
    p = problem(rank=1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        z1 = torch.randn(1, 200, generator=generator, dtype=torch.float64)
        z2 = torch.randn(1, 1, generator=generator, dtype=torch.float64)
        total += p.oracle.sample_check(p.mean + z1 * p.diag.sqrt() + z2 @ p.storage).detail["low_rank_part"] / 200
    # standard deviation of the mean 1 / 20.7 / sqrt(200) = 0.0034; five of them
    assert abs(total - 1.693 / 20.72) < 0.017
