"""PreResNet: names and arithmetic against plain functions, dropout of the same depth, gradients, memory layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear, relu

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.models import PreResNet, create_model
from tests.models.nets import assert_channels_last_agrees, assert_dropout_is_all, assert_gradients_reach_all, seeded

PLANES = (3, 4, 5)


def reference(state: dict[str, Tensor], x: Tensor, blocks: int, convolutions: int, pool: int) -> Tensor:
    """The network in training mode, from the released code's names; the 3x3 convolution of stride 2 is number
    ``convolutions - 1``: the first of two, or the second of three.
    """

    def normalised(x: Tensor, name: str) -> Tensor:
        return relu(batch_norm(x, None, None, state[f"{name}.weight"], state[f"{name}.bias"], training=True))

    x = conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, out = f"layer{stage}.{block}", x
            stride = 2 if stage > 1 and block == 0 else 1
            for i in range(1, convolutions + 1):
                weight = state[f"{name}.conv{i}.weight"]
                here = stride if i == convolutions - 1 else 1
                out = conv2d(normalised(out, f"{name}.bn{i}"), weight, stride=here, padding=weight.shape[-1] // 2)
            if f"{name}.downsample.0.weight" in state:
                x = conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
            x = out + x
    x = avg_pool2d(normalised(x, "bn"), pool)
    return linear(x.flatten(1), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("depth", "blocks", "convolutions", "size", "grid"),
    [(8, 1, 2, 32, 1), (20, 3, 2, 32, 1), (56, 6, 3, 32, 1), (14, 2, 2, 64, 2)],
)
def test_output_is_that_of_plain_functions(
    depth: int, blocks: int, convolutions: int, size: int, grid: int, generator: torch.Generator
) -> None:
    network = seeded(lambda: PreResNet(4, depth=depth, planes=PLANES, image_size=size, pool_grid=grid)).double()
    for name, parameter in network.named_parameters():  # batch norm starts at weights 1 and biases 0, which test little
        if "bn" in name:
            nn.init.normal_(parameter, mean=1.0 if "weight" in name else 0.0, std=0.2, generator=generator)
    images = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    expected = reference(network.state_dict(), images, blocks, convolutions, pool=8)
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def test_blocks_without_shortcuts(generator: torch.Generator) -> None:
    network = seeded(lambda: PreResNet(4, depth=8, planes=PLANES, skip_connections=False)).double()
    x = torch.randn(3, 16, 8, 8, generator=generator, dtype=torch.float64)
    out = x
    for i, stride in ((1, 2), (2, 1)):
        weight = network.state_dict()[f"layer2.0.conv{i}.weight"]
        if i == 1:
            out = torch.randn(3, PLANES[0], 8, 8, generator=generator, dtype=torch.float64)
            x = out
        out = relu(batch_norm(conv2d(out, weight, stride=stride, padding=1), None, None, training=True))
    torch.testing.assert_close(network.layer2(x), out, rtol=1e-12, atol=1e-12)


def test_layers_with_weights_are_as_many_as_the_name_says() -> None:
    """Counted along the longest path: every convolution but the projections, and the linear layer."""
    for depth in (8, 20, 56, 83, 110, 164):
        for name in (f"PreResNet{depth}", f"PreResNet{depth}Drop"):
            with torch.device("meta"):
                named = create_model(name, 10).named_modules()
            layers = [n for n, m in named if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
            assert len(layers) == depth, name


@pytest.mark.parametrize("depth", [8, 56])
def test_dropout_is_the_only_difference(depth: int, generator: torch.Generator) -> None:
    images = torch.randn(6, 3, 16, 16, generator=generator)

    def make(rate: float) -> Callable[[], nn.Module]:
        return lambda: PreResNet(4, depth=depth, planes=PLANES, dropout_rate=rate)

    assert_dropout_is_all(make(0.0), make(0.1), images)


@pytest.mark.parametrize("depth", [8, 56])
def test_dropout_precedes_every_inner_convolution(depth: int) -> None:
    """Calls in a forward pass: one for each convolution but the first (projections included), one before ``fc``."""
    network = seeded(lambda: PreResNet(4, depth=depth, planes=PLANES, dropout_rate=0.01))
    calls: list[float] = []
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda layer, args, out: calls.append(layer.p))
    network(torch.zeros(2, 3, 16, 16))
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in network.modules())
    assert calls == [0.01] * convolutions


@pytest.mark.parametrize("options", [dict(depth=8), dict(depth=56), dict(depth=8, skip_connections=False)])
def test_gradients_reach_every_parameter(options: dict[str, int], generator: torch.Generator) -> None:
    network = seeded(lambda: PreResNet(4, planes=PLANES, **options))
    assert_gradients_reach_all(network, torch.randn(6, 3, 16, 16, generator=generator))


@pytest.mark.parametrize("grid", [1, 2])
def test_channels_last_gives_the_same(grid: int, generator: torch.Generator) -> None:
    images = torch.randn(3, 3, 24, 24, generator=generator)
    network = seeded(lambda: PreResNet(4, depth=8, planes=PLANES, image_size=24, pool_grid=grid))
    assert_channels_last_agrees(network, images)


def test_channels_last_is_kept_to_the_end(generator: torch.Generator) -> None:
    network = seeded(lambda: PreResNet(4, depth=8)).to(memory_format=torch.channels_last)
    kept: list[bool] = []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            layer.register_forward_hook(
                lambda layer, args, out: kept.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    network(torch.randn(2, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last))
    assert len(kept) == 16 and all(kept)


@pytest.mark.parametrize("depth", [2, 9, 44, 50, 62])
def test_depths_that_do_not_exist(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6 n \+ 2 below 44 and 9 n \+ 2 from there .*; got {depth}"):
        PreResNet(10, depth=depth)


def test_other_bad_options() -> None:
    with pytest.raises(ValueError, match="Without skip connections depth must be under 44 .* got depth=56"):
        PreResNet(10, depth=56, skip_connections=False)
    with pytest.raises(ValueError, match="dropout_rate 0; got depth=8, dropout_rate=0.1"):
        PreResNet(10, depth=8, skip_connections=False, dropout_rate=0.1)
    with pytest.raises(ShapeError, match=r"planes must name the channels of 3 stages; got \(16, 32\)"):
        PreResNet(10, planes=(16, 32))
    with pytest.raises(ShapeError, match=r"multiple of 5 \(such as 160 x 160 pixels\); got image_size=32"):
        create_model("PreResNet20ImageNette", 10)
