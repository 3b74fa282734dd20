"""A tree of image files, one folder a class, read while the network trains: it may be far larger than the memory.

``root/train/CLASS/*.jpg`` and ``root/test/CLASS/*.jpg``. Without ``test`` the images of ``val`` are for testing, as
ImageNet's are used; with both, those of ``val`` are for validation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.common import SettingsError
from experiments.datasets.sources import Preparation, Source, import_torchvision

IMAGENET_SIZE = 224
LAYOUT = "DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg or test/CLASS/*.jpg"


@dataclass(frozen=True)
class Files:
    """A `Pool` of image files, sorted by class."""

    paths: tuple[str, ...]
    targets: Tensor
    class_names: tuple[str, ...]
    in_random_order: bool = False
    channels: int = 3

    def select(self, index: Tensor) -> "Files":
        return replace(self, paths=tuple(self.paths[i] for i in index.tolist()), targets=self.targets[index])

    def relabelled(self, targets: Tensor, class_names: tuple[str, ...]) -> "Files":
        return replace(self, targets=targets, class_names=class_names)

    def prepare(self, how: Preparation) -> "StreamedSplit":
        return StreamedSplit(self, how)


@dataclass(frozen=True)
class StreamedSplit:
    """Labelled images that are read, resized and normalised batch by batch; see `Split` for those held in memory."""

    files: Files
    how: Preparation

    def __len__(self) -> int:
        return len(self.files.paths)

    @property
    def targets(self) -> Tensor:
        return self.files.targets.to(self.how.device)

    @property
    def shape(self) -> tuple[int, int, int]:
        size = _size(self.how)
        return self.files.channels, size, size

    def batches(self, batch_size: int) -> "StreamedBatches":
        """Iterate in order; the last batch may be smaller."""
        return StreamedBatches(self, batch_size, torch.arange(len(self)))

    def shuffled(self, batch_size: int, generator: torch.Generator) -> "StreamedBatches":
        """Iterate in an order drawn once from `generator`; the same as that of a `Split` of as many images."""
        return StreamedBatches(self, batch_size, torch.randperm(len(self), generator=generator))

    def random_crops(self, batch_size: int, seed: int) -> "StreamedBatches":
        """Iterate in a random order over random parts of the images, as networks are trained on ImageNet.

        Each part has 8 to 100 % of its image's area and is resized, one in two is mirrored; torchvision draws them.

        Args:
            batch_size: Images in a batch.
            seed: Decides order and parts: every iteration gives the same, whatever the number of workers.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return StreamedBatches(self, batch_size, order, seed)

    def first(self, n: int) -> "StreamedSplit":
        return StreamedSplit(self.files.select(torch.arange(min(n, len(self)))), self.how)


@dataclass(frozen=True)
class StreamedBatches:
    """A re-iterable loader over a `StreamedSplit`; whatever the number of workers, the batches are the same."""

    split: StreamedSplit
    batch_size: int
    order: Tensor
    crop_seed: int | None = None

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        how, files = self.split.how, self.split.files
        loader = DataLoader(
            _Pictures(files, _size(how), self.crop_seed),
            batch_sampler=[index.tolist() for index in self.order.split(self.batch_size)],
            num_workers=how.num_workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else a DataLoader draws from the global generator whenever it is iterated
        )
        for images, index in loader:
            if isinstance(images, str):
                raise SettingsError(images)
            yield how.inputs(images), files.targets[index].to(how.device)


def _size(how: Preparation) -> int:
    return IMAGENET_SIZE if how.image_size is None else how.image_size


class _Pictures(Dataset[tuple[Tensor | str, int]]):
    """Pixels (3, size, size), uint8, of one file and its index; a file that cannot be read gives a message instead.

    Args:
        files: Where they are.
        size: Height and width to bring them to [pixels].
        crop_seed: Seed of random crops; None keeps the middle of every image.
    """

    def __init__(self, files: Files, size: int, crop_seed: int | None = None) -> None:
        self.files, self.size, self.crop_seed = files, size, crop_seed

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.functional import center_crop, hflip, pil_to_tensor, resize

        path = self.files.paths[index]
        try:
            image = default_loader(path)
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
            return f"cannot read the image {path}: {' '.join(str(error).split())}", index
        if self.crop_seed is not None:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.manual_seed((self.crop_seed * 1_000_003 + index) % 2**63)
                image = RandomResizedCrop(self.size, antialias=True)(image)
                mirrored = bool(torch.rand(()) < 0.5)
            return pil_to_tensor(hflip(image) if mirrored else image), index
        if image.size != (self.size, self.size):
            # ImageNet's protocol for testing: 256 pixels on the shorter side, of which the central 224 are kept.
            image = center_crop(resize(image, [round(self.size * 256 / 224)], antialias=True), [self.size, self.size])
        return pil_to_tensor(image), index


def _collate(items: list[tuple[Tensor | str, int]]) -> tuple[Tensor | str, Tensor]:
    """Stack a batch, or hand on its first message: an exception out of a worker would come with its whole traceback."""
    index = torch.tensor([i for _, i in items])
    images = []
    for image, _ in items:
        if isinstance(image, str):
            return image, index
        images.append(image)
    return torch.stack(images), index


def read_image_folder(root: Path, train: bool) -> Files:
    """List the files of ``root/train``, or of ``root/test`` and where there is none of ``root/val``, as of ImageNet."""
    import_torchvision("ImageFolder")
    if not (root / "train").is_dir():
        raise SettingsError(f"--data_path {root}: there is no train/ in it; {LAYOUT}")
    if train:
        return _list(root / "train")
    folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if folder is None:
        raise SettingsError(f"--data_path {root}: there is no test/ and no val/ in it; {LAYOUT}")
    return _list_like_train(folder)


def read_validation_folder(root: Path) -> Files | None:
    """List the files of ``root/val`` where ``root/test`` is what the network is tested on."""
    if (root / "val").is_dir() and (root / "test").is_dir():
        return _list_like_train(root / "val")
    return None


def _list_like_train(folder: Path) -> Files:
    found, train = _list(folder), _list(folder.with_name("train"))
    if found.class_names != train.class_names:
        odd = sorted(set(found.class_names) ^ set(train.class_names))
        raise SettingsError(f"{folder}: its classes are not those of train/; in only one of them: {', '.join(odd[:5])}")
    return found


def _list(folder: Path) -> Files:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except OSError as error:  # no class folder, or one without images
        raise SettingsError(f"{folder}: {' '.join(str(error).split())}") from None
    paths, targets = zip(*found.samples, strict=True)
    return Files(paths, torch.tensor(targets), tuple(found.classes))


IMAGE_FOLDER = Source(
    read_image_folder,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    fetch=LAYOUT,
    read_validation=read_validation_folder,
)
