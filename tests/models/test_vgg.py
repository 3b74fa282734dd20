"""VGG: names and arithmetic against the plain chain of layers, dropout, gradients, memory layout."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, linear, max_pool2d, relu

from lowrank_bdl.models import VGG, create_model
from tests.models.nets import assert_channels_last_agrees, assert_dropout_is_all, assert_gradients_reach_all, seeded

CONVOLUTIONS = {16: (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}  # of features, in the released code
POOL_AFTER = (2, 7, 14, 21, 28)


def test_names_are_those_of_the_released_code() -> None:
    names = [name for name, _ in create_model("VGG16", 10).named_parameters()]
    layers = [f"features.{i}" for i in CONVOLUTIONS[16]] + [f"classifier.{i}" for i in (1, 4, 6)]
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    dropout = [name for name, _ in create_model("VGG16BNDrop", 10).named_parameters()]
    assert dropout[:4] == ["features.1.weight", "features.1.bias", "features.2.weight", "features.2.bias"]
    no_dropout = [name for name, _ in create_model("VGG16NoDrop", 10).named_parameters()]
    assert no_dropout[-6::2] == ["classifier.0.weight", "classifier.2.weight", "classifier.4.weight"]


def test_output_is_the_chain_of_its_layers(generator: torch.Generator) -> None:
    network = seeded(lambda: VGG(5, width=3, image_size=65)).double().eval()
    images = torch.randn(2, 3, 65, 65, generator=generator, dtype=torch.float64)
    state, x = network.state_dict(), images
    for i in CONVOLUTIONS[16]:
        x = relu(conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
        x = max_pool2d(x, 2) if i in POOL_AFTER else x
    x = x.reshape(2, -1)
    for i in (1, 4, 6):
        x = linear(x, state[f"classifier.{i}.weight"], state[f"classifier.{i}.bias"])
        x = relu(x) if i != 6 else x
    torch.testing.assert_close(network(images), x, rtol=1e-12, atol=1e-14)


def test_batch_norm_lies_between_convolution_and_relu(generator: torch.Generator) -> None:
    network = seeded(lambda: VGG(5, width=3, batch_norm=True)).double()
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    state = network.state_dict()
    x = conv2d(images, state["features.0.weight"], state["features.0.bias"], padding=1)
    expected = relu(batch_norm(x, None, None, training=True))
    torch.testing.assert_close(nn.Sequential(*network.features[:3])(images), expected, rtol=1e-12, atol=1e-13)


def small(feature_dropout: float = 0.0, classifier_dropout: float = 0.5) -> VGG:
    return VGG(4, width=4, batch_norm=True, feature_dropout=feature_dropout, classifier_dropout=classifier_dropout)


def test_dropout_is_the_only_difference(generator: torch.Generator) -> None:
    images = torch.randn(6, 3, 32, 32, generator=generator)
    assert_dropout_is_all(lambda: small(), lambda: small(0.01, 0.01), images)
    rates = [layer.p for layer in create_model("VGG19Drop", 2).modules() if isinstance(layer, nn.Dropout)]
    assert rates == [0.01] * 18  # one before each of 16 convolutions, two in the classifier


def test_gradients_reach_every_parameter(generator: torch.Generator) -> None:
    assert_gradients_reach_all(seeded(lambda: small(0.01)), torch.randn(6, 3, 32, 32, generator=generator))


def test_channels_last_gives_the_same(generator: torch.Generator) -> None:
    images: Tensor = torch.randn(3, 3, 64, 64, generator=generator)
    assert_channels_last_agrees(seeded(lambda: VGG(4, width=4, image_size=64, classifier_dropout=0.0)), images)


def test_unknown_depth_and_bad_rate() -> None:
    with pytest.raises(ValueError, match="depth must be one of 16, 19; got 13"):
        VGG(10, depth=13)
    with pytest.raises(ValueError, match=r"dropout rate must lie in \[0, 1\); got 1.5"):
        VGG(10, feature_dropout=1.5)
