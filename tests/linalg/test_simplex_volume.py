"""Log-volume of a simplex against determinants and closed forms, and its gradient."""

import math

import mpmath
import pytest
import torch

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.simplex_volume import log_simplex_volume
from tests.oracles import assert_close


def cayley_menger(vertices: torch.Tensor) -> torch.Tensor:
    """Volume of one simplex from the squared distances between its corners, in 60 decimals."""
    count = len(vertices)
    with mpmath.workdps(60):
        rows = [[mpmath.mpf(v) for v in row] for row in vertices.double().tolist()]
        matrix = mpmath.ones(count + 1)
        matrix[0, 0] = 0
        for i, left in enumerate(rows):
            for j, right in enumerate(rows):
                matrix[i + 1, j + 1] = mpmath.fsum((a - b) ** 2 for a, b in zip(left, right, strict=True))
        k = count - 1
        square = (-1) ** (k + 1) * mpmath.det(matrix) / (2**k * mpmath.factorial(k) ** 2)
        return torch.tensor(float(mpmath.log(square) / 2), dtype=torch.float64)


def corners(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count,dim", [(2, 1), (2, 5), (3, 2), (3, 40), (5, 4), (6, 30)])
def test_matches_cayley_menger(count, dim, dtype):
    vertices = 3 + corners(count, dim, dtype=dtype)
    assert_close(log_simplex_volume(vertices), cayley_menger(vertices), cond=100)


def test_matches_cayley_menger_for_corners_that_nearly_coincide():
    """Vertices of size 1 whose distances are 1e-4, 1 and 1e3: float32 determinants of squared distances fail here."""
    vertices = 1 + torch.tensor([[0.0], [1e-4], [1.0], [1e3]], dtype=torch.float64) * corners(4, 50)
    assert_close(log_simplex_volume(vertices), cayley_menger(vertices), cond=1e3)
    single = vertices.float()
    assert_close(log_simplex_volume(single), cayley_menger(single), cond=1e3)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_regular_simplex(k):
    vertices = torch.eye(k + 1, dtype=torch.float64)  # edges of length sqrt(2)
    expected = math.sqrt(k + 1) / math.factorial(k)
    assert_close(log_simplex_volume(vertices), torch.tensor(math.log(expected), dtype=torch.float64))


def test_moving_turning_and_reordering_change_nothing():
    vertices = corners(4, 20)
    rotation = torch.linalg.qr(corners(20, 20, seed=1)).Q
    for changed in (vertices + corners(20, seed=2), vertices @ rotation, vertices[[2, 0, 3, 1]]):
        assert_close(log_simplex_volume(changed), log_simplex_volume(vertices), cond=100)
    assert_close(log_simplex_volume(5 * vertices), log_simplex_volume(vertices) + 3 * math.log(5), cond=10)


def test_batches_lists_and_more_columns_than_a_chunk():
    vertices = corners(2, 3, 4, 7)
    single = torch.stack([torch.stack([log_simplex_volume(v) for v in row]) for row in vertices])
    assert log_simplex_volume(vertices).shape == (2, 3)
    assert_close(log_simplex_volume(vertices), single)
    assert torch.equal(log_simplex_volume(list(vertices.unbind(-2))), log_simplex_volume(vertices))
    large = corners(3, 300_001, dtype=torch.float32)
    edges = large[1:].double() - large[:1].double()
    expected = 0.5 * torch.linalg.slogdet(edges @ edges.mT).logabsdet - math.log(2)
    assert_close(log_simplex_volume(large), expected)


@pytest.mark.parametrize("shape", [(2, 1), (3, 5), (4, 3), (2, 4, 6)])
def test_gradient_by_finite_differences(shape):
    vertices = corners(*shape).requires_grad_()
    assert torch.autograd.gradcheck(log_simplex_volume, (vertices,), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradient_of_single_precision_matches_a_dense_one():
    vertices = corners(4, 300_001, dtype=torch.float32).requires_grad_()
    (log_simplex_volume(vertices) * 3).backward()
    exact = vertices.detach().double().requires_grad_()
    edges = exact[1:] - exact[:1]
    (3 * 0.5 * torch.linalg.slogdet(edges @ edges.mT).logabsdet).backward()
    assert vertices.grad.dtype == torch.float32
    assert_close(vertices.grad, exact.grad, torch.float32)


def test_gradient_reaches_only_those_that_ask():
    free, fixed = corners(5).requires_grad_(), corners(2, 5, seed=1)
    first, middle, last = (log_simplex_volume(v) for v in ((free, *fixed), (fixed[0], free, fixed[1]), (*fixed, free)))
    for value in (first, middle, last):
        (gradient,) = torch.autograd.grad(value, free)
        edge = fixed[1] - fixed[0]
        height = (free - fixed[0]).detach()
        height -= edge * (height @ edge) / (edge @ edge)
        assert_close(gradient, height / (height @ height), cond=100)  # d log(height)


def test_flat_simplexes_have_no_volume():
    line = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [3.0, 6.0, 9.0]], dtype=torch.float64)
    twice = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 5.0]])
    assert log_simplex_volume(line) == log_simplex_volume(twice) == -math.inf
    assert log_simplex_volume(corners(4, 2)) == -math.inf  # four corners in a plane
    assert log_simplex_volume(torch.ones(2, 3)) == -math.inf
    both = torch.stack([line, corners(3, 3)]).requires_grad_()
    value = log_simplex_volume(both)
    assert value[0] == -math.inf and torch.isfinite(value[1])
    value[1].backward()
    assert torch.isnan(both.grad[0]).all() and torch.isfinite(both.grad[1]).all()
    assert torch.isnan(log_simplex_volume(torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, 0.0]])))


@pytest.mark.parametrize("height", [1e-3, 1e-6])
def test_thin_simplexes(height):
    vertices = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.3, height]], dtype=torch.float64)
    expected = torch.tensor(math.log(height / 2), dtype=torch.float64)
    assert_close(log_simplex_volume(vertices), expected, cond=1e-4 / height**2)


def test_a_point_has_volume_one():
    assert torch.equal(log_simplex_volume(torch.ones(2, 1, 3)), torch.zeros(2, dtype=torch.float64))


def test_refusals():
    with pytest.raises(ShapeError, match=r"shape \(\*B, k\+1, D\); got \(3,\)"):
        log_simplex_volume(torch.zeros(3))
    for none in ([], torch.zeros(0, 4)):
        with pytest.raises(ShapeError, match="at least 1 vertex; got none"):
            log_simplex_volume(none)
    with pytest.raises(ShapeError, match=r"must be real \(\*B, D\); got \(2,\) torch.int64"):
        log_simplex_volume(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"got \(2,\) torch.float32 cpu and \(3,\) torch.float32 cpu"):
        log_simplex_volume([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ShapeError, match=r"and \(2,\) torch.float64 cpu"):
        log_simplex_volume([torch.zeros(2), torch.zeros(2, dtype=torch.float64)])


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 6), (2, 1)])
def test_derivatives_of_any_order(shape):
    """gradgradcheck, third derivatives and torch.func against the determinant of the Gram matrix."""
    corners = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def dense(v):
        edges = v[..., 1:, :] - v[..., :1, :]
        return 0.5 * (edges @ edges.mT).logdet() - math.lgamma(v.shape[-2])

    assert torch.autograd.gradcheck(log_simplex_volume, corners)
    assert torch.autograd.gradgradcheck(log_simplex_volume, corners)
    right = torch.autograd.functional.hessian(lambda v: dense(v).sum(), corners)
    for hessian in (torch.autograd.functional.hessian, lambda f, v: torch.func.hessian(f)(v)):
        found = hessian(lambda v: log_simplex_volume(v).sum(), corners)
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)

    def third(function):
        (first,) = torch.autograd.grad(function(corners).sum(), corners, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), corners, create_graph=True)
        return torch.autograd.grad(second.square().sum(), corners)[0]

    torch.testing.assert_close(third(log_simplex_volume), third(dense), rtol=1e-8, atol=1e-8)


def test_flat_simplexes_have_no_higher_derivatives_either():
    corners = torch.tensor([[[0.0, 0], [1, 1], [2, 2]], [[0, 0], [1, 0], [0, 2]]], dtype=torch.float64)
    value, gradient = torch.func.vjp(log_simplex_volume, corners)
    assert value[0] == -torch.inf and math.isclose(value[1].item(), 0.0, abs_tol=1e-12)
    (slopes,) = gradient(torch.ones(2, dtype=torch.float64))
    assert torch.isnan(slopes[0]).all() and torch.isfinite(slopes[1]).all()
