import pytest
import torch

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.surfaces.ray import Ray, ray
from tests.oracles import assert_close

DIM = 5000


@pytest.fixture
def ends():
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(6))


def test_walks_from_one_network_to_another(ends):
    line = Ray.between(*ends)
    assert_close(torch.tensor(line.length), (ends[1] - ends[0]).double().norm(), torch.float32)
    t = torch.tensor([[0.0, 0.25], [1.0, -1.0]]) * line.length
    expected = ends[0].double() + (t / line.length)[..., None].double() * (ends[1] - ends[0]).double()
    assert_close(line.to_theta(t), expected, torch.float32)
    assert torch.equal(line.to_theta(torch.tensor(0.0)), ends[0])
    assert_close(line.project(line.to_theta(t)), t.double(), torch.float32)


def test_distances_are_distances_and_directions_may_keep_their_length(ends):
    origin, direction = ends
    unit, kept = ray(origin, direction), Ray(None, origin, direction)
    assert_close(unit.lengths, torch.ones(1, dtype=torch.float64), torch.float32)
    assert_close(kept.to_theta(torch.tensor(2.0)), origin.double() + 2 * direction.double(), torch.float32)
    side = torch.randn(DIM, generator=torch.Generator().manual_seed(7)).double()
    side -= side @ direction.double() / direction.double().square().sum() * direction.double()
    away = kept.to_theta(torch.tensor(2.0)) + side.float()
    assert_close(kept.distance(away), side.norm(), torch.float32)
    assert_close(kept.project(away), torch.tensor(2.0).double(), torch.float32)


def test_bad_rays(ends):
    with pytest.raises(ShapeError, match="none zero"):
        Ray.between(ends[0], ends[0])
    with pytest.raises(ShapeError, match="none zero"):
        ray(ends[0], torch.zeros(DIM))
    with pytest.raises(ShapeError, match="point 1 has shape"):
        ray(ends[0], ends[1][:3])
    with pytest.raises(NonFiniteError, match="entry 0 of point 0 is inf"):
        ray(torch.full((DIM,), torch.inf), ends[1])
