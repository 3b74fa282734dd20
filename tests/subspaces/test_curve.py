"""The subspace of a curve against the published construction, and what it generalises to."""

import math

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.subspaces.curve import curve_subspace
from tests.oracles import assert_close

F32, F64 = torch.float32, torch.float64


def points(n: int, dim: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, dim, dtype=F64, generator=torch.Generator().manual_seed(n)).add(3).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dim", [2, 40])
def test_three_points_are_the_published_plane(dim: int, dtype: torch.dtype) -> None:
    given = points(3, dim, dtype)
    first, bend, last = given.double()
    space, on_curve = curve_subspace(given, control_points=True), (first + last) / 4 + bend / 2
    for found, middle in ((space, on_curve), (curve_subspace(given), bend)):
        u = last - first
        v = middle - first
        v = (v - (v @ u) / (u @ u) * u) / 1.5
        assert_close(found.basis, torch.stack([u / 3**0.5, v], dim=1), dtype, 10.0)
        assert_close(found.origin, (first + middle + last) / 3, dtype)
        assert (found.rank, found.dtype) == (2, dtype) and found.basis.mT.is_contiguous()


@pytest.mark.parametrize("n", [3, 4, 6])
def test_a_regular_simplex_has_coordinates_of_length_one(n: int) -> None:
    rotation = torch.linalg.qr(torch.randn(9, n, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    corners = (5 * torch.eye(n, dtype=F64)) @ rotation.mT + 2
    space = curve_subspace(corners)
    z = space.project(corners)
    assert_close(z.norm(dim=-1), torch.ones(n, dtype=F64), F64, 10.0)
    assert_close(space.to_theta(z), corners, F64, 10.0)
    assert_close(space.gram, space.gram.diagonal().diag(), F64, 10.0)


@pytest.mark.parametrize("n", [4, 7])
def test_points_of_the_curve_itself_are_taken(n: int) -> None:
    """By de Casteljau's construction, which shares nothing with the weights that are used."""
    given, curve = points(n, 12), []
    for i in range(n):
        level = given
        while len(level) > 1:
            level = level[:-1] + i / (n - 1) * level.diff(dim=0)
        curve.append(level[0])
    expected, found = curve_subspace(torch.stack(curve)), curve_subspace(given, control_points=True)
    assert_close(found.basis, expected.basis, F64, 1e6)
    assert_close(found.origin, expected.origin, F64, 10.0)


def test_points_far_from_zero_lose_nothing() -> None:
    given = (1000 + 1e-3 * points(3, 50)).float()
    found, exact = curve_subspace(given), curve_subspace(given.double())
    assert_close(found.basis, exact.basis, F32)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [3, 5])
def test_points_that_are_flat_to_within_rounding_are_refused_and_others_are_not(n: int, dtype: torch.dtype) -> None:
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        frame = torch.linalg.qr(torch.randn(30, n, dtype=F64, generator=g)).Q.mT
        corners, across = frame[:-1], frame[-1]
        between = (torch.rand(n - 1, dtype=F64, generator=g) + 0.2).softmax(0) @ corners
        with pytest.raises(ShapeError, match=f"{n} points must span {n - 1} dimensions"):
            curve_subspace(torch.cat([corners[:1], between[None], corners[1:]]).to(dtype))
        higher = between + {F32: 1e-5, F64: 1e-6}[dtype] * across
        assert curve_subspace(torch.cat([corners[:1], higher[None], corners[1:]]).to(dtype)).rank == n - 1
    with pytest.raises(ShapeError, match="3 points must span 2 dimensions"):
        curve_subspace(points(3, 1, dtype))


def test_bad_points() -> None:
    line = torch.arange(3.0)[:, None] * torch.ones(5) + 1
    with pytest.raises(ShapeError, match="3 points must span 2 dimensions; they lie in fewer"):
        curve_subspace(line)
    with pytest.raises(ShapeError, match=r"n >= 3; got \(2, 5\)"):
        curve_subspace(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r"must be real .* torch.int64"):
        curve_subspace(torch.zeros(3, 5, dtype=torch.int64))
    broken = points(3, 5)
    broken[1, 2] = math.nan
    with pytest.raises(NonFiniteError, match="must be finite"):
        curve_subspace(broken)
