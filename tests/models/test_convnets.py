"""LeNet5 and ConvFC: names and arithmetic against plain functions, gradients, memory layout."""

import pytest
import torch
from torch.nn.functional import conv2d, linear, max_pool2d, relu

from lowrank_bdl.models import ConvFC, LeNet5
from tests.models.nets import assert_channels_last_agrees, assert_gradients_reach_all, seeded

NETS = [(LeNet5, 1, 28, 0, (2, 2), (0, 3), (0, 2)), (ConvFC, 3, 32, 2, (3, 2), (0, 3, 6), (0, 2, 4))]


@pytest.mark.parametrize(("make", "channels", "size", "padding", "pool", "convolutions", "linears"), NETS)
def test_output_is_that_of_plain_functions(
    make: type[LeNet5] | type[ConvFC],
    channels: int,
    size: int,
    padding: int,
    pool: tuple[int, int],
    convolutions: tuple[int, ...],
    linears: tuple[int, ...],
    generator: torch.Generator,
) -> None:
    network = seeded(lambda: make(6, in_channels=channels, image_size=size)).double()
    state = network.state_dict()
    images = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
    x = images
    for i in convolutions:
        weight, bias = state.pop(f"conv_part.{i}.weight"), state.pop(f"conv_part.{i}.bias")
        x = max_pool2d(relu(conv2d(x, weight, bias, padding=padding)), *pool)
    x = x.flatten(1)
    for i in linears:
        x = linear(x, state.pop(f"fc_part.{i}.weight"), state.pop(f"fc_part.{i}.bias"))
        x = relu(x) if i != linears[-1] else x
    assert not state  # no parameter is left over
    torch.testing.assert_close(network(images), x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("make", [LeNet5, ConvFC])
def test_gradients_and_memory_format(make: type[LeNet5] | type[ConvFC], generator: torch.Generator) -> None:
    network, images = seeded(lambda: make(4, image_size=20)), torch.randn(6, 3, 20, 20, generator=generator)
    assert_gradients_reach_all(network, images)
    assert_channels_last_agrees(network, images)


def test_lenet_with_dropout_is_the_same_network_but_for_dropout(generator: torch.Generator) -> None:
    plain, drop = (seeded(lambda rate=rate: LeNet5(4, image_size=20, dropout_rate=rate)) for rate in (0.0, 0.5))
    images = torch.randn(3, 3, 20, 20, generator=generator)
    assert list(drop.state_dict()) == list(plain.state_dict())
    assert torch.equal(drop.eval()(images), plain.eval()(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(drop.train()(images), drop(images))
    assert torch.equal(plain.train()(images), plain(images))
    with pytest.raises(ValueError, match=r"dropout rate must lie in \[0, 1\); got 1\.0"):
        LeNet5(4, image_size=20, dropout_rate=1.0)
