"""What a reader hands over: labelled images before they are split, relabelled and normalised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from experiments.common import SettingsError
from experiments.datasets.splits import LabelledImages, Split

P = TypeVar("P", bound="Pool")


@dataclass(frozen=True)
class Preparation:
    """How pixels become inputs: (pixel - mean) / std per channel, pixels in [0, 1], at one size, on one device.

    Attributes:
        mean: One number a channel.
        std: One number a channel.
        image_size: Height and width [pixels]; None leaves them as they are.
        device: Where the inputs go.
        num_workers: Processes that read images which are not held in memory.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None
    device: torch.device
    num_workers: int = 0

    def inputs(self, images: Tensor) -> Tensor:
        """Normalise images (N, C, H, W), uint8 or floating in [0, 1], on the device."""
        images = images.to(self.device)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.float().clone()
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)


class Pool(Protocol):
    """Labelled images that can be selected from and relabelled before any of them is prepared.

    Attributes:
        targets: Class indices (N,), int64, on the CPU.
        class_names: One name a class.
        in_random_order: Whether the last images are as good a sample as any; a sorted pool must be shuffled first.
    """

    @property
    def targets(self) -> Tensor: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def channels(self) -> int: ...

    @property
    def in_random_order(self) -> bool: ...

    def select(self: P, index: Tensor) -> P:
        """Keep the images of these indices, in this order."""

    def relabelled(self: P, targets: Tensor, class_names: tuple[str, ...]) -> P:
        """Replace the labels (N,)."""

    def prepare(self, how: Preparation) -> LabelledImages:
        """Resize, normalise and move the images."""


@dataclass(frozen=True)
class InMemory:
    """A `Pool` of images (N, C, H, W), uint8 or floating in [0, 1], read from one or a few files."""

    images: Tensor
    targets: Tensor
    class_names: tuple[str, ...]
    in_random_order: bool = True

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def select(self, index: Tensor) -> "InMemory":
        return replace(self, images=self.images[index], targets=self.targets[index])

    def relabelled(self, targets: Tensor, class_names: tuple[str, ...]) -> "InMemory":
        return replace(self, targets=targets, class_names=class_names)

    def prepare(self, how: Preparation) -> Split:
        return Split(how.inputs(resize(self.images, how.image_size)), self.targets.to(how.device))


def resize(images: Tensor, size: int | None, chunk: int = 1000) -> Tensor:
    """Resize images (N, C, H, W) to (N, C, size, size), bilinearly and antialiased; None leaves them alone."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    from torchvision.transforms.v2.functional import resize as resize_chunk

    return torch.cat([resize_chunk(part, [size, size], antialias=True) for part in images.split(chunk)])


@dataclass(frozen=True)
class Source:
    """A data set that `load_dataset` knows.

    Attributes:
        read: Reads the training images (True) or the test images (False) from a folder.
        mean: Of the official training images, one number a channel, pixels in [0, 1].
        std: Likewise.
        fetch: How to get the files, for messages; empty where there are none.
        image_size: Size at which swa_gaussian uses the images, where that is not their own [pixels].
        validation: Images held out of the official training images, where that is not the rule of `load_dataset`.
        class_splits: Classes that ``split_classes`` keeps.
        read_validation: Reads the data set's own validation images; returns None for a folder that has none.
    """

    read: Callable[[Path, bool], Pool]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fetch: str = ""
    image_size: int | None = None
    validation: int | None = None
    class_splits: Sequence[Sequence[int]] = ()
    read_validation: Callable[[Path], Pool | None] | None = None


def import_torchvision(name: str) -> None:
    """Refuse a data set that needs torchvision where there is none."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise SettingsError(f'--dataset {name} needs torchvision: pip install -e ".[experiments]"') from None


def how_to_fetch(name: str) -> str:
    """Say how to get the files of one of torchvision's data sets; nothing is downloaded here."""
    if name == "SVHN":
        made = "[SVHN('DIR', split, download=True) for split in ('train', 'test')]"
    else:
        made = f"{name}('DIR', download=True)"
    return f'to get it: python -c "from torchvision.datasets import {name}; {made}", then --data_path DIR'
