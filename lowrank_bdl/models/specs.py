"""What is on record about a named network: how to make it, and the settings it was published with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Settings of a published SWAG run with SGD; rank 20, one snapshot an epoch.

    Attributes:
        epochs: Epochs in all.
        lr_init: Learning rate of the first half of the ``swa_start`` epochs.
        wd: Weight decay (torch's convention: the gradient of wd/2 times the squared norm).
        swa_start: Epochs before the first snapshot.
        swa_lr: Learning rate while snapshots are taken.
        momentum: Momentum of SGD.
        batch_size: Examples in a batch.
        prior_var: Variance of a Gaussian prior on the weights that replaces weight decay; None for none.
    """

    epochs: int
    lr_init: float
    wd: float
    swa_start: int
    swa_lr: float
    momentum: float = 0.9
    batch_size: int = 128
    prior_var: float | None = None


class Normalization(NamedTuple):
    """Mean and standard deviation of each input channel, of images in [0, 1].

    Attributes:
        mean: Subtracted.
        std: Divided by.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A named network.

    Attributes:
        name: As ``--model`` of the released scripts spells it.
        build: ``build(num_classes, in_channels=..., image_size=..., **options)`` makes the network.
        options: What the name fixes; :func:`create_model` may override it.
        task: "classification", "segmentation" or "regression".
        normalization: Published normalisation of images in [0, 1]; None for none.
        recipes: Data set to published settings.
    """

    name: str
    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    task: str = "classification"
    normalization: Normalization | None = None
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: MappingProxyType({}))
