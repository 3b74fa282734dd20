"""Averages against their closed forms over a known sequence of weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lowrank_bdl as lb
from lowrank_bdl.training import averages

STEPS = 12


@pytest.fixture
def iterates(generator: torch.Generator) -> Tensor:
    return torch.randn(STEPS, 9, generator=generator, dtype=torch.float64)


def average_of(make: Callable[[nn.Module], AveragedModel], iterates: Tensor) -> Tensor:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    layout = lb.ParameterLayout.from_module(net)
    averaged = make(net)
    for theta in iterates:
        layout.assign_(net, theta)
        averaged.update_parameters(net)
    return averages.weights(averaged)


@pytest.mark.parametrize("make", [averages.swa, averages.polyak])
def test_equal_averages_are_the_mean(make: Callable[[nn.Module], AveragedModel], iterates: Tensor) -> None:
    torch.testing.assert_close(average_of(make, iterates), iterates.mean(0), rtol=1e-12, atol=1e-14)


def test_swa_is_the_mean_that_swag_keeps(iterates: Tensor) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    swag = lb.SWAG(net, rank=2)
    for theta in iterates:
        swag.layout.assign_(net, theta)
        swag.update_parameters(net)
    torch.testing.assert_close(average_of(averages.swa, iterates), swag.mean, rtol=1e-12, atol=1e-14)


def test_an_exponential_average_is_the_weighted_sum(iterates: Tensor) -> None:
    beta = 0.7
    found = average_of(lambda net: averages.ema(net, beta), iterates)
    powers = beta ** torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    weights = torch.cat([powers[:1], (1 - beta) * powers[1:]])  # the first iterate begins the average
    torch.testing.assert_close(found, weights @ iterates, rtol=1e-12, atol=1e-14)


def test_a_warm_up_forgets_the_first_iterates(iterates: Tensor) -> None:
    found = average_of(lambda net: averages.ema(net, 0.8, warmup=True), iterates)
    expected = iterates[0]
    for n, theta in enumerate(iterates[1:], start=1):
        beta = min(1 - 1 / (n + 1), 0.8)
        expected = beta * expected + (1 - beta) * theta
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # torch counts updates in single precision
    equal = average_of(lambda net: averages.ema(net, 0.99, warmup=True), iterates)
    torch.testing.assert_close(equal, iterates.mean(0), rtol=1e-6, atol=1e-7)  # all of it is warm-up


def test_an_averaging_function_of_one_s_own(iterates: Tensor) -> None:
    found = average_of(lambda net: averages.custom(net, lambda old, new, n: torch.minimum(old, new)), iterates)
    assert torch.equal(found, iterates.min(0).values)


def test_the_model_is_copied_and_an_empty_average_refused() -> None:
    net = nn.Linear(2, 1)
    averaged = averages.swa(net)
    assert averaged.module.weight is not net.weight
    with pytest.raises(ValueError, match="at least 1 update; got 0"):
        averages.weights(averaged)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\); got 1.0"):
        averages.ema(net, 1.0)
