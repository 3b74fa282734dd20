"""Test images of another data set, brought into the form that a network takes; and its labels, where classes agree."""

import dataclasses

import torch
from torch import Tensor

from experiments.common import SettingsError
from experiments.datasets.loading import DATASETS, Datasets, find_source, read_test_images
from experiments.datasets.sources import InMemory, Pool, Preparation, resize
from experiments.datasets.splits import LabelledImages
from lowrank_bdl.models.registry import closest_first

NOISE = "noise"
"""Name of images whose pixels are independent and uniform in [0, 1]."""

_NUM_NOISE = 10_000
_NOISE_SEED = 0  # which pixels is part of the data set, not of a run

# Class of the first set to class of the second. STL10 has a monkey where CIFAR10 has a frog; all others are the same.
_LABEL_MAPS = {("STL10", "CIFAR10"): (0, 2, 1, 3, 4, 5, 7, 6, 8, 9)}


def foreign_images(name: str, data: Datasets, data_path: str | None = None, limit: int | None = None) -> LabelledImages:
    """Return test images of another data set as inputs of a network that was trained on `data`.

    Grey images get as many equal channels as the network takes; colours become Rec. 601 luma where it takes one. Images
    of another size are resized (bilinearly, antialiased). Then pixels are normalised with the mean and the standard
    deviation of `data`, as anything is that this network is given.

    Args:
        name: A data set of `load_dataset`, or `NOISE`: pixels independent and uniform in [0, 1], always the same.
        data: What the network was trained on.
        data_path: Folder with the files of the other set.
        limit: At most so many images, the first of a fixed random order; None: all of them, of `NOISE` 10,000.

    Returns:
        The images, on the device of `data`. Targets are classes of the *other* set (of `NOISE` all 0).

    Raises:
        SettingsError: If the data set is unknown or that of `data` itself, its files are missing or damaged, or it is a
            folder tree of photographs and the network takes one channel.
    """
    if name == data.name:
        raise SettingsError(f"{name} is what the network was trained on; foreign images must be of another data set")
    if name != NOISE and name not in DATASETS:
        known = ", ".join(closest_first(name, dict.fromkeys([*DATASETS, NOISE])))
        raise SettingsError(f"unknown data set {name!r}; known are {known}")
    pool = _noise(data, limit) if name == NOISE else read_test_images(name, data_path, limit)
    how = Preparation(data.mean, data.std, data.image_size, data.train.targets.device)
    return _with_channels(name, pool, data).prepare(how)


def _noise(data: Datasets, limit: int | None) -> InMemory:
    if limit is not None and limit < 1:
        raise SettingsError(f"the number of images must be at least 1; got {limit}")
    count = min(_NUM_NOISE, _NUM_NOISE if limit is None else limit)
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    shape = (count, data.channels, data.image_size, data.image_size)
    return InMemory(torch.rand(shape, generator=generator), torch.zeros(count, dtype=torch.int64), (NOISE,))


def _with_channels(name: str, pool: Pool, data: Datasets) -> Pool:
    """Give the images as many channels as the network takes."""
    if pool.channels == data.channels:
        return pool
    if not isinstance(pool, InMemory):
        raise SettingsError(f"{name} has {pool.channels} channels; a network for {data.name} takes {data.channels}")
    if pool.channels == 1:
        images = resize(pool.images, data.image_size).expand(-1, data.channels, -1, -1)
    else:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        images = rgb_to_grayscale(pool.images)
    return dataclasses.replace(pool, images=images)


def label_map(source: str, target: str) -> Tensor:
    """Return the class of one data set that each class of another one is counted as.

    A network trained on `target` is right about an image of `source` with label y if it says ``label_map[y]``. Between
    STL10 and CIFAR10, as published: nine classes are the same; the monkeys of one are counted as the frogs of the
    other, which no network can know, so that a tenth of the images is all but lost.

    Args:
        source: The data set that the labels are of.
        target: The data set that the network was trained on.

    Returns:
        Classes of `target`, (number of classes of `source`,), int64.

    Raises:
        SettingsError: If the classes of the two do not correspond.

    Source: Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (2019), section 5.3.

    Example:
        >>> label_map("STL10", "CIFAR10").tolist()
        [0, 2, 1, 3, 4, 5, 7, 6, 8, 9]
    """
    for name in (source, target):
        find_source(name)
    if (source, target) in _LABEL_MAPS:
        return torch.tensor(_LABEL_MAPS[source, target])
    if (target, source) in _LABEL_MAPS:
        return torch.tensor(_LABEL_MAPS[target, source]).argsort()
    known = ", ".join(f"{a} and {b}" for a, b in _LABEL_MAPS)
    raise SettingsError(f"there is no map from the classes of {source} to those of {target}, only between {known}")
