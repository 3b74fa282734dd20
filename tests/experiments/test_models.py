"""Networks for the scripts: every source, and one line for whatever cannot be built."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.common import SettingsError
from experiments.models import SmallConvNet, build_model, model_names
from lowrank_bdl.models import MODELS, PreResNet


def seeded(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(name, num_classes, **{**dict(channels=3, image_size=32), **options})


def test_names_come_from_the_library_and_from_here() -> None:
    assert {"PreResNet20", "VGG16", "SmallConvNet", "MobileNetV2"} <= set(model_names())
    assert "RegNet" not in model_names() and model_names("segmentation") == tuple(n for n in MODELS if "FCD" in n)
    assert isinstance(seeded("PreResNet20", depth=8), PreResNet)
    assert isinstance(seeded("SmallConvNet", width=2), SmallConvNet)


def test_widths() -> None:
    narrow = seeded("PreResNet8-width3")
    assert [stage[0].conv1.out_channels for stage in (narrow.layer1, narrow.layer2, narrow.layer3)] == [3, 6, 12]
    for small, wide in (("VGG16-width2", "VGG16-width4"), ("SmallConvNet-width4", "SmallConvNet")):
        sizes = [sum(p.numel() for p in seeded(name).parameters()) for name in (small, wide)]
        assert 3 < sizes[1] / sizes[0] < 4.5
    twice = [seeded(name).state_dict() for name in ("PreResNet8-width16", "PreResNet8")]
    assert all(torch.equal(twice[0][name], twice[1][name]) for name in twice[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LeNet5-width3", "--model LeNet5-width3: only PreResNets, VGGs and SmallConvNets come in other widths"),
        ("PreResNet8-width0", "a width must be at least 1"),
        ("PreResNet9-width2", "--model PreResNet9 is unknown; the closest known are"),
    ],
)
def test_widths_that_there_are_not(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        seeded(name)


def test_the_small_network_with_dropout_has_the_same_weights() -> None:
    plain, drop = seeded("SmallConvNet", width=2), seeded("SmallConvNetDrop", width=2)
    assert list(drop.state_dict()) == list(plain.state_dict())
    assert [module.p for module in drop.modules() if isinstance(module, nn.Dropout)] == [0.1]
    assert not any(isinstance(module, nn.Dropout) for module in plain.modules())


def test_mobilenet_has_torchvision_s_weights_and_a_stem_of_stride_one() -> None:
    """2,236,682 weights: torchvision's 3,504,872 for 1000 classes, less 990 rows of 1281."""
    network = seeded("MobileNetV2")
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_236_682
    sizes: list[tuple[int, ...]] = []
    network.features.register_forward_hook(lambda layer, args, out: sizes.append(tuple(out.shape[2:])))
    with torch.no_grad():
        assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 2)]


@pytest.mark.parametrize(("image_size", "channels", "stride"), [(28, 1, 1), (96, 3, 2), (96, 1, 2), (63, 3, 1)])
def test_mobilenet_s_stem_follows_the_images(image_size: int, channels: int, stride: int) -> None:
    with torch.device("meta"):
        network = build_model("MobileNetV2", 7, channels=channels, image_size=image_size)
        assert network(torch.empty(2, channels, image_size, image_size)).shape == (2, 7)
    assert network.features[0][0].stride == (stride, stride)


def test_mobilenet_s_weights_depend_on_the_seed_alone() -> None:
    first, again = seeded("MobileNetV2").state_dict(), seeded("MobileNetV2").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_torchvision_s_imagenet_networks() -> None:
    with torch.device("meta"):
        network = build_model("resnet18", 1000, channels=3, image_size=224)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_689_512


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VGG61", {}, r"--model VGG61 is unknown; the closest known are VGG16, "),
        ("smallconvnet", {}, r"--model smallconvnet is unknown; the closest known are SmallConvNet, "),
        ("resnet55", {}, r"--model resnet55: torchvision has resnet50, "),
        ("VGG16", dict(image_size=28), r"--model VGG16: VGG-16 takes images of 32 x 32 pixels or more; got .*=28"),
        ("VGG16", dict(widht=3), r"--model VGG16: .*unexpected keyword argument 'widht'"),
        ("MobileNetV2", dict(widht=3), r"--model MobileNetV2: .*unexpected keyword argument 'widht'"),
        ("RegNet", {}, r"--model RegNet is a network for regression, and this is classification"),
        ("VGG16", dict(task="regression"), r"--model VGG16 is a network for classification, and this is regression"),
        (
            "SmallConvNet",
            dict(task="regression"),
            r"--model SmallConvNet is unknown; the closest known are ToyRegNet, RegNet",
        ),
        ("resnet18", dict(channels=1), r"--model resnet18: takes images with 3 channels; got 1"),
        ("densenet121", dict(image_size=28), r"--model densenet121: cannot take images of 28 pixels: "),
    ],
)
def test_what_cannot_be_built_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(SettingsError, match=message) as error:
        build_model(name, 10, **{**dict(channels=3, image_size=32), **options})
    assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), before)


def test_torchvision_is_imported_for_its_own_networks_alone() -> None:
    code = (
        "import sys; from experiments.models import build_model; build_model('LeNet5', 10, channels=1, image_size=28);"
        "print('torchvision' in sys.modules); build_model('MobileNetV2', 10, channels=3, image_size=32);"
        "print('torchvision' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert result.stdout.split() == ["False", "True"], result.stderr
