"""FCDenseNet: names and arithmetic against plain functions, odd sizes, dropout, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, conv_transpose2d, max_pool2d, relu

from lowrank_bdl.models import FCDenseNet
from tests.models.nets import assert_channels_last_agrees, assert_dropout_is_all, assert_gradients_reach_all, seeded

SMALL = dict(down_blocks=(1, 2), bottleneck_layers=2, growth=3, stem=4)


def small(**options: Any) -> FCDenseNet:
    return FCDenseNet(5, **{**SMALL, **options})


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network without dropout in training mode, from the released code's names; takes what it uses from `state`."""

    def normalised_convolution(x: Tensor, name: str) -> Tensor:
        x = relu(batch_norm(x, None, None, state.pop(f"{name}.norm.weight"), state.pop(f"{name}.norm.bias"), True))
        weight = state.pop(f"{name}.conv.weight")
        return conv2d(x, weight, state.pop(f"{name}.conv.bias"), padding=weight.shape[-1] // 2)

    def dense(x: Tensor, name: str, new_only: bool) -> Tensor:
        new: list[Tensor] = []
        while f"{name}.layers.{len(new)}.conv.weight" in state:
            new.append(normalised_convolution(torch.cat([x, *new], 1), f"{name}.layers.{len(new)}"))
        return torch.cat(new if new_only else [x, *new], 1)

    x = conv2d(x, state.pop("firstconv.weight"), state.pop("firstconv.bias"), padding=1)
    skips = []
    for i in range(2):
        x = dense(x, f"denseBlocksDown.{i}", new_only=False)
        skips.append(x)
        x = max_pool2d(normalised_convolution(x, f"transDownBlocks.{i}"), 2)
    x = dense(x, "bottleneck.bottleneck", new_only=True)
    for i in range(2):
        skip, name = skips.pop(), f"transUpBlocks.{i}.convTrans"
        x = conv_transpose2d(x, state.pop(f"{name}.weight"), state.pop(f"{name}.bias"), stride=2)
        rows, columns = (x.shape[2] - skip.shape[2]) // 2, (x.shape[3] - skip.shape[3]) // 2
        x = x[:, :, rows : rows + skip.shape[2], columns : columns + skip.shape[3]]
        x = dense(torch.cat([x, skip], 1), f"denseBlocksUp.{i}", new_only=i == 0)
    return conv2d(x, state.pop("finalConv.weight"), state.pop("finalConv.bias"))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 14)])
def test_output_is_that_of_plain_functions(height: int, width: int, generator: torch.Generator) -> None:
    network = seeded(lambda: small(dropout_rate=0.0)).double()
    state = {name: parameter.detach() for name, parameter in network.named_parameters()}
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    expected = reference(state, images)
    assert not state  # no parameter is left over
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-11)


def test_a_second_map_for_each_class(generator: torch.Generator) -> None:
    network = seeded(lambda: small(aleatoric=True, dropout_rate=0.0))
    images = torch.randn(2, 3, 8, 12, generator=generator)
    both = network(images)
    assert both.shape == (2, 2, 5, 8, 12)
    network.aleatoric = False
    torch.testing.assert_close(torch.cat(both.unbind(1), 1), network(images))


def test_dropout_is_the_only_difference(generator: torch.Generator) -> None:
    images = torch.randn(4, 3, 8, 8, generator=generator)
    assert_dropout_is_all(lambda: small(dropout_rate=0.0), small, images)


def test_gradients_and_memory_format(generator: torch.Generator) -> None:
    network, images = seeded(lambda: small(dropout_rate=0.0)), torch.randn(2, 3, 9, 8, generator=generator)
    assert_gradients_reach_all(network, images)
    assert_channels_last_agrees(network, images)
