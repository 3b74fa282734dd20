"""Networks for the scripts, by name: the library's, a small convolutional one, and some of torchvision's."""

import re
from typing import Any

import torch
from torch import nn

from experiments.common import SettingsError
from lowrank_bdl.models import MODELS, create_model
from lowrank_bdl.models.registry import closest_first

OWN = ("SmallConvNet", "SmallConvNetDrop", "MobileNetV2")
TORCHVISION = ("resnet", "resnext", "wide_resnet", "densenet")  # beginnings of the names taken from there
WIDTH = re.compile(r"(?P<network>.+)-width(?P<width>\d+)")  # a network with other numbers of channels
FULL_STRIDE_FROM = 64  # smaller images go through MobileNetV2's first convolution with stride 1 [pixels]


class SmallConvNet(nn.Sequential):
    """Four batch-normalised 3x3 convolutions, global average pooling and one linear layer, trained in seconds.

    Takes images of any size from 8 x 8; from 16 x 16 the first convolution has stride 2, which makes it as cheap.

    Args:
        channels: Number of channels of the images.
        image_size: Height (= width) of the images [pixels].
        num_classes: Number of logits.
        width: Channels of the first convolution; the last has four times as many.
        dropout_rate: Probability that a pooled feature is dropped; of SmallConvNetDrop 0.1.

    Shape:
        ``(N, channels, image_size, image_size)`` to ``(N, num_classes)``.
    """

    def __init__(
        self, channels: int, image_size: int, num_classes: int, width: int = 8, dropout_rate: float = 0.0
    ) -> None:
        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(channels, width, stride=2 if image_size >= 16 else 1),
            *block(width, 2 * width),
            nn.MaxPool2d(2),
            *block(2 * width, 4 * width),
            *block(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Sequential(nn.Flatten(), nn.Dropout(dropout_rate)) if dropout_rate else nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )


def mobilenet_v2(num_classes: int, *, channels: int, image_size: int, **options: Any) -> nn.Module:
    """Make torchvision's MobileNetV2, for small images too.

    Under 64 pixels the first convolution has stride 1 in place of 2, so that images of 32 x 32 pixels reach the last
    stage with 2 x 2 maps and not with 1 x 1; everything else, and so the number of weights for three channels, is
    torchvision's.
    """
    from torchvision.models import MobileNetV2

    model = MobileNetV2(num_classes=num_classes, **options)
    published = model.features[0][0]
    if channels != published.in_channels or image_size < FULL_STRIDE_FROM:
        stem = nn.Conv2d(
            channels,
            published.out_channels,
            kernel_size=3,
            stride=1 if image_size < FULL_STRIDE_FROM else 2,
            padding=1,
            bias=False,
        )
        nn.init.kaiming_normal_(stem.weight, mode="fan_out")  # as torchvision draws it
        model.features[0][0] = stem
    return model


def model_names(task: str = "classification") -> tuple[str, ...]:
    """Name the networks that `build_model` knows without asking torchvision."""
    known = tuple(name for name, spec in MODELS.items() if spec.task == task)
    return known + OWN if task == "classification" else known


def build_model(
    name: str, num_classes: int, *, channels: int, image_size: int, task: str = "classification", **options: Any
) -> nn.Module:
    """Make a network by name; its initial weights come from torch's global generator.

    Args:
        name: A name of `lowrank_bdl.models.MODELS`, SmallConvNet(Drop), MobileNetV2 (see `mobilenet_v2`), or a ResNet,
            ResNeXt, Wide ResNet or DenseNet as torchvision spells it ("resnet50", "densenet161"; untrained). Pre-
            activation residual networks, VGGs and SmallConvNets come in any width: "PreResNet8-width4" has 4, 8 and 16
            channels in its stages.
        num_classes: Number of logits.
        channels: Channels of the images.
        image_size: Height and width of the images [pixels].
        task: What the script does: "classification", "segmentation" or "regression".
        **options: Of the network.

    Raises:
        SettingsError: If there is no such network, or it does not fit the task, the images or the options.
    """
    if (found := WIDTH.fullmatch(name)) is not None:
        chosen = of_width(name, found["network"], int(found["width"]))
        options = {**chosen, **options}
        name = found["network"]
    if name in MODELS and MODELS[name].task != task:
        raise SettingsError(f"--model {name} is a network for {MODELS[name].task}, and this is {task}")
    try:
        if name in MODELS:
            return create_model(name, num_classes, in_channels=channels, image_size=image_size, **options)
        if task == "classification":
            if name in ("SmallConvNet", "SmallConvNetDrop"):
                rate = {"dropout_rate": 0.1} if name.endswith("Drop") else {}
                return SmallConvNet(channels, image_size, num_classes, **{**rate, **options})
            if name == "MobileNetV2":
                return mobilenet_v2(num_classes, channels=channels, image_size=image_size, **options)
            if name.startswith(TORCHVISION):
                return torchvision_model(name, num_classes, channels, image_size, **options)
    except (ValueError, TypeError) as error:  # ShapeError is a ValueError
        raise SettingsError(f"--model {name}: {error}") from None
    closest = closest_first(name, dict.fromkeys(model_names(task)))
    raise SettingsError(f"--model {name} is unknown; the closest known are {', '.join(closest[:5])}")


def of_width(name: str, network: str, width: int) -> dict[str, Any]:
    """Return the options that give a network a width: channels of its first stage, which later ones are multiples of.

    Raises:
        SettingsError: If it has no width, or the width is 0.
    """
    if width < 1:
        raise SettingsError(f"--model {name}: a width must be at least 1")
    if network.startswith("PreResNet"):
        return {"planes": (width, 2 * width, 4 * width)}
    if network.startswith(("VGG", "SmallConvNet")):
        return {"width": width}
    raise SettingsError(f"--model {name}: only PreResNets, VGGs and SmallConvNets come in other widths")


def torchvision_model(name: str, num_classes: int, channels: int, image_size: int, **options: Any) -> nn.Module:
    """Make one of torchvision's ImageNet networks without trained weights, if it takes these images."""
    from torchvision import models

    known = [known for known in models.list_models(module=models) if known.startswith(TORCHVISION)]
    if name not in known:
        raise ValueError(f"torchvision has {', '.join(closest_first(name, dict.fromkeys(known))[:5])}")
    if channels != 3:
        raise ValueError(f"takes images with 3 channels; got {channels}")

    def make() -> nn.Module:
        return models.get_model(name, weights=None, num_classes=num_classes, **options)

    try:
        with torch.device("meta"):  # shapes alone, and no draws
            make()(torch.empty(2, channels, image_size, image_size))
    except RuntimeError as error:
        raise ValueError(f"cannot take images of {image_size} pixels: {str(error).splitlines()[0]}") from None
    return make()
