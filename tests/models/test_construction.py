"""Checks of sizes, dropout of rate 0, and the law of the initial convolutions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.models.construction import at_least, dropout, image_side, initialise_convolutions_


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_anything_that_is_an_integer_is_a_size(value: int) -> None:
    assert at_least("num_classes", value) == 3 and type(at_least("num_classes", value)) is int


@pytest.mark.parametrize("value", [3.0, "3", None, torch.tensor(3.0)])
def test_what_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(ShapeError, match="num_classes must be an integer; got"):
        at_least("num_classes", value)  # type: ignore[arg-type]


def test_image_side_names_the_network_and_the_least_size() -> None:
    assert image_side("Net", 8, least=8) == 8
    with pytest.raises(ShapeError, match="Net takes images of 8 x 8 pixels or more; got image_size=7"):
        image_side("Net", 7, least=8)


def test_dropout_of_rate_zero_draws_nothing() -> None:
    before = torch.get_rng_state()
    values = torch.ones(5)
    assert dropout(0.0).train()(values) is values
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(dropout(0.2, channels=True), nn.Dropout2d) and isinstance(dropout(0.2), nn.Dropout)


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_dropout_rates_outside_the_interval(rate: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\); got"):
        dropout(rate)


def test_convolutions_get_the_variance_two_over_fan_out() -> None:
    """38,400 draws: their variance is within 5 standard errors (chance 6e-7); by fan in it would be 170 times that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, linear = nn.Conv2d(3, 512, 5), nn.Linear(3, 4)
        kept = linear.weight.detach().clone()
        initialise_convolutions_(nn.Sequential(layer, linear))
    expected, number = 2 / (25 * 512), layer.weight.numel()
    assert abs(layer.weight.double().square().mean().item() / expected - 1) < 5 * math.sqrt(2 / number)
    assert abs(layer.weight.double().mean().item()) < 5 * math.sqrt(expected / number)
    assert torch.equal(layer.bias, torch.zeros(512)) and torch.equal(linear.weight, kept)
