import pytest
import torch
from torch import nn

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.subspaces.subspace import Subspace
from lowrank_bdl.surfaces.plane import Plane, plane
from tests.oracles import assert_close

DIM = 5000


@pytest.fixture
def points():
    return torch.randn(3, DIM, generator=torch.Generator().manual_seed(3))


def test_three_points_are_on_their_plane_where_published(points):
    w0, w1, w2 = points
    found = Plane.through(w0, w1, w2)
    wide, bend = (w2 - w0).double(), (w1 - w0).double()
    along = bend @ wide / wide.norm()
    expected = torch.stack([torch.zeros(2), torch.tensor([along, (bend.square().sum() - along**2).sqrt()])])
    assert_close(
        found.project(points), torch.cat([expected.double(), torch.tensor([[wide.norm(), 0.0]])]), points.dtype
    )
    assert_close(found.to_theta(found.project(points)), points.double(), points.dtype, cond=4)
    assert found.distance(points).max() < 1e-4
    assert torch.equal(found.to_theta(torch.zeros(2)), w0)
    assert torch.equal(found.anchors, found.project(points).double())
    frame = found.directions.double() @ found.directions.double().mT
    torch.testing.assert_close(frame, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_agree_with_dense_least_squares(dtype):
    generator = torch.Generator().manual_seed(4)
    origin, u, v = torch.randn(3, DIM, generator=generator, dtype=dtype)
    oblique = Plane(None, origin, u, u + 0.5 * v)
    theta = torch.randn(2, 5, DIM, generator=generator, dtype=dtype)
    basis = oblique.basis.double()
    offsets = (theta - origin).double().reshape(-1, DIM)
    z = torch.linalg.lstsq(basis, offsets.mT).solution.mT
    assert_close(oblique.project(theta), z.reshape(2, 5, 2), dtype, cond=20)
    gap = (offsets - z @ basis.mT).norm(dim=1).reshape(2, 5)
    assert_close(oblique.distance(theta), gap, dtype)
    xy = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    assert_close(oblique.to_theta(xy), origin.double() + xy @ basis.mT, dtype, cond=3)


def test_is_what_a_subspace_is(points):
    found = Plane.through(*points)
    space = Subspace(found.layout, found.origin, found.basis)
    xy = torch.tensor([[1.0, -2.0], [30.0, 0.5]])
    assert_close(found.to_theta(xy), space.to_theta(xy).double(), torch.float32, cond=3)


def test_is_differentiable_in_its_coordinates(points):
    found = Plane.through(*points.double())
    xy = torch.tensor([[0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(found.to_theta(xy).sum(), xy)
    assert_close(slope, found.directions.sum(1)[None])


def test_grid_is_a_picture_with_published_margins(points):
    found = Plane.through(*points)
    grid = found.grid((5, 3), margin=(0.5, 0.0, 0.1, 0.2))
    low, high = found.anchors.amin(0), found.anchors.amax(0)
    size = high - low
    assert grid.shape == (3, 5, 2) and grid.dtype == torch.float64
    torch.testing.assert_close(grid[0, 0], low - size * torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(grid[-1, -1], high + size * torch.tensor([0.0, 0.2]))
    assert torch.equal(grid[0, :, 0], grid[2, :, 0]) and torch.equal(grid[:, 0, 1], grid[:, 4, 1])
    assert bool((grid.diff(dim=1)[..., 0] > 0).all() and (grid.diff(dim=0)[..., 1] > 0).all())
    published = found.grid(21)
    torch.testing.assert_close(published[0, 0], low - 0.2 * size)
    around = found.grid(3, around=torch.tensor([[0.0, 0.0], [2.0, 4.0]]), margin=0)
    assert around[:, 0, 1].tolist() == [0.0, 2.0, 4.0]
    ball = plane(*points).grid(3, radius=2.0)
    assert ball[0].tolist() == [[-2.0, -2.0], [0.0, -2.0], [2.0, -2.0]]


def test_bad_planes_and_grids(points):
    w0, w1, w2 = points
    layout = ParameterLayout.from_module(nn.Linear(2, 2))
    with pytest.raises(ShapeError, match="none zero, none parallel"):
        Plane.through(w0, w0 + 0.25 * (w2 - w0), w2)
    with pytest.raises(ShapeError, match="vectors of 6 real"):
        Plane.through(w0, w1, w2, layout)
    with pytest.raises(ShapeError, match="point 2 has shape"):
        plane(w0, w1, w2[:-1])
    with pytest.raises(NonFiniteError, match="entry 7 of point 1 is nan"):
        plane(w0, w1.index_fill(0, torch.tensor([7]), torch.nan), w2)
    with pytest.raises(ShapeError, match=r"anchors must be finite coordinates \(n, 2\)"):
        Plane(None, w0, w1, w2, anchors=torch.zeros(3))
    found = Plane.through(w0, w1, w2)
    with pytest.raises(ShapeError, match=r"xy must have shape \(\*S, 2\); got \(3,\)"):
        found.to_theta(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 5000\); got \(3,\)"):
        found.project(torch.zeros(3))
    with pytest.raises(ValueError, match="at least 2 points along each axis; got 1"):
        found.grid(1)
    with pytest.raises(ValueError, match="radius must be a positive number, without around"):
        found.grid(3, radius=0.0)
    with pytest.raises(ValueError, match="without around"):
        found.grid(3, radius=1.0, around=torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="must frame some width and height; 1 point"):
        plane(w0, w1, w2).grid(3)
