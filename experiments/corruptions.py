"""Corrupted test images in the style of CIFAR-10-C, made here: 17 corruptions at five severities, from a seed.

Parameters are those of the published CIFAR-10-C, whose images are 32 pixels wide; lengths are in pixels whatever the
size of the images, unless the parameters are fractions of it. Of the published 19 corruptions two are left out: frost,
which needs photographs of it, and spatter, whose water needs an edge detector that neither scipy nor torchvision has.
One file holds one corruption at one severity.

The mean absolute change of the pixels grows with severity, but for four corruptions whose published severities are not
more and more of one thing: saturate turns colours down at the first two and up at the others; glass_blur and
elastic_transform weigh one effect against another; and motion_blur at 3 and 4 differs by what lies six standard
deviations out. Unlike in the released code pixels are rounded to the nearest of 256 values, and not cut down to one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import corruption_kinds as kinds
from experiments.common import SettingsError, replacing
from experiments.datasets import DATASETS, Datasets, Split
from experiments.datasets.labels import keep_classes
from experiments.datasets.sources import InMemory, Preparation
from lowrank_bdl.models.registry import closest_first

SEVERITIES = (1, 2, 3, 4, 5)
SET_NAME = re.compile(r"(?P<name>\w+)-[1-5]")  # what predictions call the images of a file
_CHUNK = 500  # images corrupted at once; draws, and so results, depend on it


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
        apply: See `experiments.corruption_kinds`.
        parameters: Those of severities 1 to 5.
        group: "noise", "blur", "weather", "colour" or "digital".
        needs_colour: Whether grey images have nothing that it could change.
    """

    apply: Callable[[Tensor, Any, torch.Generator], Tensor]
    parameters: tuple[Any, ...]
    group: str
    needs_colour: bool = False


def _factors(stop: float) -> tuple[float, ...]:
    return tuple(np.arange(1, stop, 0.01).tolist())


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(kinds.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), "noise"),
    "shot_noise": Corruption(kinds.shot_noise, (500, 250, 100, 75, 50), "noise"),
    "impulse_noise": Corruption(kinds.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), "noise"),
    "speckle_noise": Corruption(kinds.speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), "noise"),
    "gaussian_blur": Corruption(kinds.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), "blur"),
    "defocus_blur": Corruption(kinds.defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)), "blur"),
    "glass_blur": Corruption(kinds.glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)), "blur"),
    "motion_blur": Corruption(kinds.motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), "blur"),
    "zoom_blur": Corruption(kinds.zoom_blur, tuple(map(_factors, (1.06, 1.11, 1.16, 1.21, 1.26))), "blur"),
    "snow": Corruption(
        kinds.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "weather",
    ),
    "fog": Corruption(kinds.fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), "weather"),
    "brightness": Corruption(kinds.brightness, (0.05, 0.1, 0.15, 0.2, 0.3), "colour"),
    "contrast": Corruption(kinds.contrast, (0.75, 0.5, 0.4, 0.3, 0.15), "colour"),
    "saturate": Corruption(
        kinds.saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), "colour", needs_colour=True
    ),
    "jpeg_compression": Corruption(kinds.jpeg_compression, (80, 65, 58, 50, 40), "digital"),
    "pixelate": Corruption(kinds.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), "digital"),
    "elastic_transform": Corruption(
        kinds.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "digital",
    ),
}
"""The corruptions by name."""


def names_for(channels: int) -> tuple[str, ...]:
    """Name the corruptions that change images of so many channels."""
    return tuple(name for name, kind in CORRUPTIONS.items() if channels == 3 or not kind.needs_colour)


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupt images, each with draws of its own.

    Args:
        images: Shape (N, H, W, C) with C = 1 or 3, uint8, on the CPU.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        generator: Source of all draws, a CPU generator.

    Returns:
        New images of the same shape, uint8, rounded to the nearest of 256 values.

    Raises:
        SettingsError: If the name or the severity is unknown, images have another shape or type, or grey images are to
            be changed in saturation.

    Example:
        >>> image = torch.full((1, 2, 2, 1), 100, dtype=torch.uint8)
        >>> corrupt(image, "brightness", 4, torch.Generator()).unique()  # a fifth of 255 brighter
        tensor([151], dtype=torch.uint8)
    """
    if name not in CORRUPTIONS:
        known = ", ".join(closest_first(name, CORRUPTIONS))
        raise SettingsError(f"unknown corruption {name!r}; known are {known}")
    if severity not in SEVERITIES:
        raise SettingsError(f"the severity must be 1 to 5; got {severity}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise SettingsError(
            f"images must be uint8 of shape (N, H, W, C), C = 1 or 3; got {images.dtype} of {tuple(images.shape)}"
        )
    kind = CORRUPTIONS[name]
    if kind.needs_colour and images.shape[-1] != 3:
        raise SettingsError(f"{name} needs colours; the images are grey")
    done = torch.empty_like(images)
    for part, out in zip(images.split(_CHUNK), done.split(_CHUNK), strict=True):
        pixels = part.permute(0, 3, 1, 2).float().div_(255).contiguous()
        changed = kind.apply(pixels, kind.parameters[severity - 1], generator)
        out.copy_(changed.clamp(0, 1).mul_(255).round_().permute(0, 2, 3, 1))
    return done


def generator_for(seed: int, name: str, severity: int) -> torch.Generator:
    """Return the generator of one file, which depends on nothing but these three."""
    digest = hashlib.blake2b(f"{seed}/{name}/{severity}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def file_name(name: str, severity: int) -> str:
    return f"{name}_{severity}.npz"


def set_name(name: str, severity: int) -> str:
    return f"{name}-{severity}"


def write_images(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write images (N, H, W, C), uint8, and labels (N,) as ``data`` and ``labels`` of a .npz file, or nothing."""
    with replacing(path) as file:
        np.savez(file, data=images.numpy(), labels=labels.numpy().astype(np.uint8))


def read_images(folder: Path, name: str, severity: int) -> InMemory:
    """Read images (N, C, H, W), uint8, and labels of one corruption at one severity; see `load_corrupted`."""
    path, published = folder / file_name(name, severity), folder / f"{name}.npy"
    try:
        if path.is_file() or not published.is_file():
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                images, labels = file["data"], file["labels"]
        else:
            path = published
            arrays = (np.load(file, mmap_mode="r", allow_pickle=False) for file in (path, folder / "labels.npy"))
            images, labels = (_of_severity(array, severity).copy() for array in arrays)
    except FileNotFoundError as error:
        raise SettingsError(f"there is no {error.filename}; python -m experiments.corrupt makes it") from None
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise SettingsError(
            f"cannot read {path}: {' '.join(str(error).split())}; delete it and make it again"
        ) from None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise SettingsError(f"{path}: expected uint8 images (N, H, W, C); got {images.dtype} of {images.shape}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise SettingsError(
            f"{path}: expected {len(images)} labels, integers from 0; got {labels.dtype} of {labels.shape}"
        )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels.astype(np.int64))
    return InMemory(pixels, targets, tuple(map(str, range(int(targets.max()) + 1))))


def _of_severity(array: np.ndarray, severity: int) -> np.ndarray:
    """Return one fifth of a published array, which holds the five severities one after another."""
    count = len(array) // len(SEVERITIES)
    return array[(severity - 1) * count : severity * count]


def load_corrupted(folder: "str | Path", name: str, severity: int, data: Datasets) -> Split:
    """Read one corruption at one severity, normalised as `data` is and on its device.

    Where `data` has half of the classes, only their images are kept and numbered as there.

    Args:
        folder: What ``python -m experiments.corrupt`` wrote, ``NAME_SEVERITY.npz``; or the published CIFAR-10-C:
            ``NAME.npy``, which holds all severities, and ``labels.npy``.
        name: The corruption.
        severity: 1 to 5.
        data: What the network was trained on.

    Raises:
        SettingsError: If the file is missing or damaged, or of images of another data set, size or number of channels.
    """
    if severity not in SEVERITIES:
        raise SettingsError(f"the severity must be 1 to 5; got {severity}")
    folder = Path(folder)
    _check_same_dataset(folder, data)
    pool = read_images(folder, name, severity)
    wanted = (data.channels, data.image_size, data.image_size)
    if pool.images.shape[1:] != wanted:
        shape = tuple(pool.images.shape[1:])
        raise SettingsError(
            f"{folder}: images of {name} have shape {shape}; the network for {data.name} takes {wanted}"
        )
    classes = DATASETS[data.name].class_splits if "split_classes" in data.details else ()
    number = sum(map(len, classes)) or data.num_classes
    if len(pool.class_names) > number:
        raise SettingsError(f"{folder}: {name} has label {len(pool.class_names) - 1}; {data.name} has {number} classes")
    if classes:
        named = pool.relabelled(pool.targets, tuple(map(str, range(number))))
        pool = keep_classes(named, classes[data.details["split_classes"]])
    return pool.prepare(Preparation(data.mean, data.std, None, data.train.targets.device))


def _check_same_dataset(folder: Path, data: Datasets) -> None:
    """Refuse a folder that was made of another data set, where it says of which."""
    try:
        made_of = json.loads((folder / "settings.json").read_text(encoding="utf-8")).get("dataset", data.name)
    except (OSError, ValueError, AttributeError):
        return
    if made_of != data.name:
        raise SettingsError(f"{folder} holds corrupted images of {made_of}; the network was trained on {data.name}")
