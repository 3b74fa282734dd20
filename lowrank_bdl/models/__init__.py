"""Networks of the published experiments, with the published shapes and parameter counts, made by name."""

from lowrank_bdl.models.convnets import ConvFC, LeNet5
from lowrank_bdl.models.fc_densenet import FCDenseNet
from lowrank_bdl.models.mlp import MLP, RegNet
from lowrank_bdl.models.preresnet import PreResNet
from lowrank_bdl.models.registry import MODELS, create_model
from lowrank_bdl.models.specs import ModelSpec, Normalization, Recipe
from lowrank_bdl.models.vgg import VGG
from lowrank_bdl.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "MODELS",
    "VGG",
    "ConvFC",
    "FCDenseNet",
    "LeNet5",
    "ModelSpec",
    "Normalization",
    "PreResNet",
    "Recipe",
    "RegNet",
    "WideResNet",
    "create_model",
]
