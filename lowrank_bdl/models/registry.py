"""Networks by name, with the settings they were published with."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from lowrank_bdl.models.construction import at_least
from lowrank_bdl.models.convnets import ConvFC, LeNet5
from lowrank_bdl.models.fc_densenet import FCDenseNet
from lowrank_bdl.models.mlp import MLP, RegNet
from lowrank_bdl.models.preresnet import PreResNet
from lowrank_bdl.models.specs import ModelSpec, Normalization, Recipe
from lowrank_bdl.models.vgg import VGG
from lowrank_bdl.models.wide_resnet import WideResNet


def create_model(
    name: str, num_classes: int, *, in_channels: int = 3, image_size: int = 32, **options: Any
) -> nn.Module:
    """Make a network by name.

    The initial weights come from torch's global generator, as those of every ``nn.Module``; the example shows how to
    fix them without disturbing it.

    Args:
        name: A key of :data:`MODELS`.
        num_classes: Number of logits, or of targets of a regression network.
        in_channels: Channels of the images.
        image_size: Height and width of the images [pixels].
        **options: Of the network's class, for example ``width=32`` of :class:`~lowrank_bdl.models.vgg.VGG`.
            ``in_features`` gives the number of features of MLP (default: that of the images) and RegNet (required).

    Returns:
        The network, in training mode, on torch's default device and in its default dtype.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones, the closest first.
        ShapeError: If the network cannot take the image size, or a size is not positive.
        TypeError: If the network has no such option.

    Cost: O(D), for D weights; under ``torch.device("meta")`` nothing is allocated or drawn.

    Example:
        >>> import torch
        >>> with torch.random.fork_rng(devices=[]):
        ...     _ = torch.manual_seed(0)
        ...     net = create_model("PreResNet20", 10)
        >>> sum(p.numel() for p in net.parameters())
        272282
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(closest_first(name, MODELS))}")
    spec = MODELS[name]
    sizes = dict(in_channels=at_least("in_channels", in_channels), image_size=at_least("image_size", image_size))
    return spec.build(at_least("num_classes", num_classes), **sizes, **{**spec.options, **options})


def closest_first(name: str, known: Mapping[str, Any]) -> list[str]:
    """Order names by their likeness to a misspelt one, upper and lower case alike.

    Args:
        name: What was asked for.
        known: What there is.

    Returns:
        All known names.

    Example:
        >>> closest_first("vgg61", {"LeNet5": 0, "VGG16": 1})
        ['VGG16', 'LeNet5']
    """
    matcher = difflib.SequenceMatcher(b=name.casefold())

    def likeness(other: str) -> float:
        matcher.set_seq1(other.casefold())
        return matcher.ratio()

    return sorted(known, key=likeness, reverse=True)


def _perceptron(
    num_classes: int, *, in_channels: int, image_size: int, in_features: int | None = None, **options: Any
) -> MLP:
    return MLP(num_classes, in_features=in_channels * image_size**2 if in_features is None else in_features, **options)


def _regression_net(num_classes: int, *, in_channels: int, image_size: int, **options: Any) -> RegNet:
    return RegNet(num_classes, **options)  # no images: the features are counted by in_features


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
MNIST = Normalization((0.1307,), (0.3081,))
CAMVID = Normalization(
    (0.41189489566336, 0.4251328133025, 0.4326707089857), (0.27413549931506, 0.28506257482912, 0.28284674400252)
)

_NO_RECIPES: Mapping[str, Recipe] = MappingProxyType({})
_VGG16 = Recipe(epochs=300, lr_init=0.05, wd=5e-4, swa_start=161, swa_lr=0.01)
_VGG16_RECIPES = {"CIFAR10": _VGG16, "CIFAR100": _VGG16}
_PRERESNET20_RECIPES = {"CIFAR10": Recipe(epochs=300, lr_init=0.1, wd=3e-4, swa_start=161, swa_lr=0.01)}
_PRERESNET164_RECIPES = {
    "CIFAR10": Recipe(epochs=300, lr_init=0.1, wd=3e-4, swa_start=161, swa_lr=0.01),
    "CIFAR100": Recipe(epochs=300, lr_init=0.1, wd=3e-4, swa_start=161, swa_lr=0.05),
}
_WIDE = Recipe(epochs=300, lr_init=0.1, wd=5e-4, swa_start=161, swa_lr=0.05)
_WIDE_RECIPES = {"CIFAR10": _WIDE, "CIFAR100": _WIDE}
_LENET_RECIPES = {"MNIST": Recipe(epochs=50, lr_init=0.05, wd=0.0, swa_start=25, swa_lr=0.01, prior_var=0.1)}
_CAMVID_RECIPES = {
    "CamVid": Recipe(epochs=1000, lr_init=1e-2, wd=1e-4, swa_start=850, swa_lr=1e-3, batch_size=4),
}


def _vgg(name: str, recipes: Mapping[str, Recipe] = _NO_RECIPES, /, **options: Any) -> ModelSpec:
    return ModelSpec(name, VGG, options, "classification", IMAGENET, recipes)


def _preresnet(name: str, recipes: Mapping[str, Recipe] = _NO_RECIPES, /, **options: Any) -> ModelSpec:
    return ModelSpec(name, PreResNet, options, "classification", CIFAR, recipes)


def _fc_densenet(name: str, recipes: Mapping[str, Recipe] = _NO_RECIPES, /, **options: Any) -> ModelSpec:
    return ModelSpec(name, FCDenseNet, options, "segmentation", CAMVID, recipes)


_VGG_DROP = dict(feature_dropout=0.01, classifier_dropout=0.01)
_WIDE_DROP = dict(block_dropout=0.05, classifier_dropout=0.05)
_DROP = dict(dropout_rate=0.01)
_SPECS = (
    _vgg("VGG16", _VGG16_RECIPES),
    _vgg("VGG16BN", batch_norm=True),
    _vgg("VGG16Drop", _VGG16_RECIPES, **_VGG_DROP),
    _vgg("VGG16BNDrop", batch_norm=True, **_VGG_DROP),
    _vgg("VGG16NoDrop", classifier_dropout=0.0),
    _vgg("VGG16BNNoDrop", batch_norm=True, classifier_dropout=0.0),
    _vgg("VGG16Half", width=32),
    _vgg("VGG16Quarter", width=16),
    _vgg("VGG19", depth=19),
    _vgg("VGG19BN", depth=19, batch_norm=True),
    _vgg("VGG19Drop", depth=19, **_VGG_DROP),
    _vgg("VGG19BNDrop", depth=19, batch_norm=True, **_VGG_DROP),
    _preresnet("PreResNet8", depth=8),
    _preresnet("PreResNet20", _PRERESNET20_RECIPES, depth=20),
    _preresnet("PreResNet56", depth=56),
    _preresnet("PreResNet83", depth=83),
    _preresnet("PreResNet110", depth=110),
    _preresnet("PreResNet164", _PRERESNET164_RECIPES, depth=164),
    _preresnet("PreResNet8Drop", depth=8, **_DROP),
    _preresnet("PreResNet20Drop", depth=20, **_DROP),
    _preresnet("PreResNet56Drop", depth=56, **_DROP),
    _preresnet("PreResNet83Drop", depth=83, **_DROP),
    _preresnet("PreResNet110Drop", depth=110, **_DROP),
    _preresnet("PreResNet164Drop", _PRERESNET164_RECIPES, depth=164, **_DROP),
    _preresnet("PreResNet20NoSkip", depth=20, skip_connections=False),
    _preresnet("PreResNet20ImageNette", depth=20, planes=(4, 8, 16), pool_grid=5),
    _preresnet("PreResNet20NoSkipImageNette", depth=20, planes=(4, 8, 16), pool_grid=5, skip_connections=False),
    ModelSpec("WideResNet28x10", WideResNet, {}, "classification", CIFAR, _WIDE_RECIPES),
    ModelSpec("WideResNet28x10Drop", WideResNet, _WIDE_DROP, "classification", CIFAR, _WIDE_RECIPES),
    ModelSpec("LeNet5", LeNet5, {}, "classification", MNIST, _LENET_RECIPES),
    ModelSpec("LeNet5Drop", LeNet5, dict(dropout_rate=0.5), "classification", MNIST, _LENET_RECIPES),
    ModelSpec("ConvFC", ConvFC),
    ModelSpec("MLP", _perceptron),
    ModelSpec("RegNet", _regression_net, task="regression"),
    ModelSpec("ToyRegNet", _perceptron, dict(in_features=2, hidden=(200, 50, 50, 50)), task="regression"),
    _fc_densenet("FCDenseNet57", down_blocks=(4, 4, 4, 4, 4), bottleneck_layers=4, growth=12),
    _fc_densenet("FCDenseNet67", _CAMVID_RECIPES),
    _fc_densenet("FCDenseNet103", down_blocks=(4, 5, 7, 10, 12), bottleneck_layers=15),
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
"""Every network by name. PreResNet20ImageNette and its NoSkip twin take images of 160 x 160 pixels."""
