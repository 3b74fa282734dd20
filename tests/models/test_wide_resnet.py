"""WideResNet: names and arithmetic against plain functions, dropout, gradients, memory layout."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear, relu

from lowrank_bdl.models import WideResNet, create_model
from tests.models.nets import assert_channels_last_agrees, assert_dropout_is_all, assert_gradients_reach_all, seeded


def small(block_dropout: float = 0.0, classifier_dropout: float = 0.0) -> WideResNet:
    return WideResNet(4, depth=16, widen_factor=1, block_dropout=block_dropout, classifier_dropout=classifier_dropout)


def reference(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The network in training mode, from the released code's names."""

    def convolved(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return conv2d(x, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    x = convolved(x, "conv1")
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = convolved(relu(batch_norm(x, None, None, training=True)), f"{name}.conv1")
            out = convolved(relu(batch_norm(out, None, None, training=True)), f"{name}.conv2", stride)
            project = f"{name}.shortcut.0.weight" in state
            x = out + (convolved(x, f"{name}.shortcut.0", stride) if project else x)
    x = avg_pool2d(relu(batch_norm(x, None, None, training=True)), 8).flatten(1)
    return linear(x, state["linear.weight"], state["linear.bias"])


def test_output_is_that_of_plain_functions(generator: torch.Generator) -> None:
    network = seeded(small).double()
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    expected = reference(network.state_dict(), images, blocks=2)
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def test_published_details() -> None:
    with torch.device("meta"):
        network = create_model("WideResNet28x10Drop", 10)
    assert network.bn1.momentum == 0.9
    assert all(layer.bias is not None for layer in network.modules() if isinstance(layer, nn.Conv2d))
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.05] * 13
    assert [network.layer1[0].conv1.out_channels, network.linear.in_features] == [160, 640]


@pytest.mark.parametrize("rates", [(0.1, 0.0), (0.0, 0.1)])
def test_dropout_is_the_only_difference(rates: tuple[float, float], generator: torch.Generator) -> None:
    assert_dropout_is_all(small, partial(small, *rates), torch.randn(6, 3, 16, 16, generator=generator))


def test_gradients_reach_every_parameter(generator: torch.Generator) -> None:
    assert_gradients_reach_all(seeded(small), torch.randn(6, 3, 16, 16, generator=generator))


def test_channels_last_gives_the_same(generator: torch.Generator) -> None:
    network = seeded(lambda: WideResNet(4, depth=10, widen_factor=1))
    assert_channels_last_agrees(network, torch.randn(3, 3, 16, 16, generator=generator))


@pytest.mark.parametrize("depth", [4, 11, 27])
def test_depths_that_do_not_exist(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be 6 n \+ 4 .*; got {depth}"):
        WideResNet(10, depth=depth)
