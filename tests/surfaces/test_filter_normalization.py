import pytest
import torch
from torch import nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.filter_normalization import filter_normalized


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def test_every_filter_is_as_long_as_the_networks(network):
    layout = ParameterLayout.from_module(network)
    theta = layout.flatten(network)
    direction = torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))
    found = layout.unflatten(filter_normalized(direction, theta, layout))
    own, given = layout.unflatten(theta), layout.unflatten(direction)
    for name in ("0.weight", "3.weight"):
        for f in range(len(own[name])):
            expected = given[name][f] * (own[name][f].norm() / given[name][f].norm())
            torch.testing.assert_close(found[name][f], expected)
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        assert not found[name].any()
    kept = layout.unflatten(filter_normalized(direction, theta, layout, ignore_vectors=False))
    torch.testing.assert_close(kept["3.bias"], given["3.bias"] * own["3.bias"].norm() / given["3.bias"].norm())


def test_a_filter_without_direction_stays_zero(network):
    layout = ParameterLayout.from_module(network)
    theta = layout.flatten(network)
    direction = torch.ones(layout.numel)
    direction[:18] = 0
    found = filter_normalized(direction, theta, layout)
    assert not found[:18].any() and found[18:36].norm() > 0


def test_rescaled_networks_look_the_same():
    """The purpose: (2 w1, w2 / 2) is the same function as (w1, w2), and so is it along its own direction."""
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    layout = ParameterLayout.from_module(network)
    theta = layout.flatten(network)
    scaled = theta.clone()
    scaled[:12] *= 2
    scaled[12:] /= 2
    direction = torch.randn(layout.numel, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    f, x = FunctionalModel(network, layout), torch.randn(5, 3, dtype=torch.float64)
    one = f(theta + 0.3 * filter_normalized(direction, theta, layout), x)
    other = f(scaled + 0.3 * filter_normalized(direction, scaled, layout), x)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    raw = f(scaled + 0.3 * direction, x)
    assert (raw - f(theta + 0.3 * direction, x)).abs().max() > 1e-2


def test_what_does_not_fit_is_refused(network):
    layout = ParameterLayout.from_module(network)
    with pytest.raises(ShapeError, match="vectors of"):
        filter_normalized(torch.ones(3), torch.ones(layout.numel), layout)
