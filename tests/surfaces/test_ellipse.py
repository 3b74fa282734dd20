import math

import pytest
import torch

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.surfaces.ellipse import projected_gaussian, swag_ellipse
from lowrank_bdl.surfaces.plane import Plane, plane
from tests.oracles import assert_close, dense

DIM, RANK = 60, 4


def gaussian(dtype, rank=RANK):
    generator = torch.Generator().manual_seed(8)
    root = torch.randn(DIM, rank, generator=generator, dtype=dtype)
    diag = torch.rand(DIM, generator=generator, dtype=dtype)
    mean = torch.randn(DIM, generator=generator, dtype=dtype)
    return GaussianPosterior(mean, LowRankPlusDiagLinearOperator(root, diag)), dense(root, diag)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [plane, lambda *vectors: Plane(None, *vectors)], ids=["orthonormal", "oblique"])
@pytest.mark.parametrize("rank", [0, RANK])
def test_projection_agrees_with_the_dense_covariance(dtype, make, rank):
    posterior, covariance = gaussian(dtype, rank)
    seen = make(*torch.randn(3, DIM, generator=torch.Generator().manual_seed(9), dtype=dtype))
    inverse = torch.linalg.pinv(seen.basis.double())
    mean, found = projected_gaussian(seen, posterior)
    assert_close(mean, inverse @ (posterior.mean - seen.origin).double(), dtype, cond=4)
    assert_close(found, inverse @ covariance @ inverse.mT, dtype, cond=4)
    ellipse = swag_ellipse(seen, posterior, sigmas=2.5, num=41)
    offsets = ellipse - mean
    squared = torch.einsum("ni,ij,nj->n", offsets, torch.linalg.inv(inverse @ covariance @ inverse.mT), offsets)
    assert_close(squared, torch.full((41,), 2.5**2, dtype=torch.float64), dtype, cond=10)
    assert torch.equal(ellipse[0], ellipse[-1])
    turns = torch.linalg.solve(torch.linalg.cholesky(found), offsets.mT).mT
    angle = torch.atan2(turns[:, 1], turns[:, 0]).diff().remainder(2 * math.pi)
    assert min(angle.max().item(), (2 * math.pi - angle).max().item()) < 0.3  # goes around once, in steps


def test_draws_fall_inside_as_often_as_a_chi_squared_law_says():
    posterior, _ = gaussian(torch.float64)
    seen = plane(*torch.randn(3, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    mean, covariance = projected_gaussian(seen, posterior)
    draws = seen.project(posterior.sample(4000, generator=torch.Generator().manual_seed(10))) - mean
    inside = (draws * torch.linalg.solve(covariance, draws.mT).mT).sum(1) < 4.0
    expected = 1 - math.exp(-2.0)  # two degrees of freedom, at 2 standard deviations
    error = math.sqrt(expected * (1 - expected) / 4000)
    assert abs(inside.double().mean() - expected) < 4 * error  # false alarm once in 16,000


def test_a_gaussian_without_extent_is_a_point():
    seen = plane(*torch.eye(3))
    still = GaussianPosterior.diagonal(torch.ones(3), torch.zeros(3))
    assert torch.equal(swag_ellipse(seen, still), seen.project(still.mean).double().expand(200, 2))


def test_bad_ellipses():
    seen = plane(*torch.eye(3))
    posterior = GaussianPosterior.diagonal(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="sigmas must be a positive number; got 0"):
        swag_ellipse(seen, posterior, sigmas=0)
    with pytest.raises(ValueError, match="num must be at least 2; got 1"):
        swag_ellipse(seen, posterior, num=1)
    with pytest.raises(ShapeError, match="as many weights; got 3 and 4"):
        swag_ellipse(seen, GaussianPosterior.diagonal(torch.ones(4), torch.ones(4)))
